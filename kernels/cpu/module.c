/* The Python module llmkit.kernels.cpu._cpu_kernels. It also runs programs: recorded kernel calls
 * that are repeated without returning to Python in between. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu_kernels.h"

/* Every kernel takes integers (some of them addresses), then floats. */
enum { MAX_INTS = 19, MAX_FLOATS = 2 };

/* Returns 0 when out of memory. */
typedef int (*KernelFunction)(const int64_t *ints, const double *floats);

typedef struct {
    KernelFunction run;
    int64_t ints[MAX_INTS];
    double floats[MAX_FLOATS];
} Call;

/* Convert Python arguments. Returns 0 with an exception set when they do not fit. */
static int parse_numbers(PyObject *const *args, Py_ssize_t n_args, int64_t *ints, int n_ints,
                         double *floats, int n_floats) {
    if (n_args != n_ints + n_floats) {
        PyErr_Format(PyExc_TypeError, "%d numbers were expected, %zd were given",
                     n_ints + n_floats, n_args);
        return 0;
    }
    for (int i = 0; i < n_ints; i++)
        ints[i] = PyLong_AsLongLong(args[i]);
    for (int i = 0; i < n_floats; i++)
        floats[i] = PyFloat_AsDouble(args[n_ints + i]);
    return !PyErr_Occurred();
}

static PyObject *run_calls(const Call *calls, int64_t n_calls) {
    int done = 1;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t i = 0; done && i < n_calls; i++)
        done = calls[i].run(calls[i].ints, calls[i].floats);
    Py_END_ALLOW_THREADS
    if (!done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* Define a kernel: a KernelFunction, whose body follows the macro, and a Python function that calls
 * it. The arguments are in the order of _cpu_kernels.pyi. */
#define KERNEL(NAME, N_INTS, N_FLOATS)                                                             \
    enum { NAME##_n_ints = N_INTS, NAME##_n_floats = N_FLOATS };                                   \
    static int run_##NAME(const int64_t *ints, const double *floats);                              \
    static PyObject *py_##NAME(PyObject *self, PyObject *const *args, Py_ssize_t n_args) {         \
        Call call = {run_##NAME, {0}, {0}};                                                        \
        (void)self;                                                                                \
        if (!parse_numbers(args, n_args, call.ints, N_INTS, call.floats, N_FLOATS))                \
            return NULL;                                                                           \
        return run_calls(&call, 1);                                                                \
    }                                                                                              \
    static int run_##NAME(const int64_t *ints, const double *floats)

/* Integer argument I as an address. */
#define ADDRESS(TYPE, I) ((TYPE *)(intptr_t)ints[I])

KERNEL(linear, 13, 0) {
    (void)floats;
    Linear p = {
        .weight_type = (int)ints[0],
        .x = ADDRESS(const float, 1),
        .x_stride = ints[2],
        .weight = ADDRESS(const char, 3),
        .scales = ADDRESS(const float, 4),
        .offsets = ADDRESS(const float, 5),
        .bias = ADDRESS(const float, 6),
        .y = ADDRESS(float, 7),
        .y_stride = ints[8],
        .rows = ints[9],
        .cols = ints[10],
        .depth = ints[11],
        .group_size = ints[12],
    };
    p.panel_stride = packed_panel_bytes(p.weight_type, p.depth);
    float *group_sums = NULL;
    if (p.offsets) {
        group_sums = malloc((p.rows * (p.depth / p.group_size) + 1) * sizeof *group_sums);
        if (group_sums == NULL)
            return 0;
    }
    p.group_sums = group_sums;
    linear(&p, group_sums);
    free(group_sums);
    return 1;
}

KERNEL(linear_w8a8, 10, 0) {
    (void)floats;
    const float *x = ADDRESS(const float, 0);
    int64_t x_stride = ints[1];
    Linear layer = {
        .weight_type = WEIGHT_INT8,
        .weight = ADDRESS(const char, 2),
        .scales = ADDRESS(const float, 3),
        .bias = ADDRESS(const float, 4),
        .y = ADDRESS(float, 5),
        .y_stride = ints[6],
        .rows = ints[7],
        .cols = ints[8],
        .depth = ints[9],
        .group_size = ints[9],
    };
    layer.panel_stride = packed_panel_bytes(WEIGHT_INT8, layer.depth);
    int16_t *q = malloc(layer.rows * layer.depth * sizeof *q + 64);
    float *row_scales = malloc(layer.rows * sizeof *row_scales + 64);
    int enough_memory = q && row_scales;
    if (enough_memory) {
        quantize_rows(x, x_stride, layer.rows, layer.depth, q, row_scales);
        LinearW8A8 p = {.linear = layer, .q = q, .row_scales = row_scales};
        linear_w8a8(&p);
    }
    free(q);
    free(row_scales);
    return enough_memory;
}

KERNEL(paged_attention, 19, 2) {
    PagedAttention a = {
        .q = ADDRESS(const float, 0),
        .out = ADDRESS(float, 1),
        .q_stride = ints[2],
        .quantized = (int)ints[3],
        .kv = ADDRESS(const char, 4),
        .scales = ADDRESS(const float, 5),
        .static_scales = (int)ints[6],
        .head_stride = ints[7],
        .block_size = ints[8],
        .head_dim = ints[9],
        .n_heads = ints[10],
        .n_kv_heads = ints[11],
        .n_sequences = ints[12],
        .query_lens = ADDRESS(const int64_t, 13),
        .seq_lens = ADDRESS(const int64_t, 14),
        .block_tables = ADDRESS(const int64_t, 15),
        .table_starts = ADDRESS(const int64_t, 16),
        .window = ints[17],
        .sinks = ADDRESS(const float, 18),
        .scale = (float)floats[0],
        .softcap = (float)floats[1],
    };
    return paged_attention(&a);
}

KERNEL(rms_norm, 5, 1) {
    rms_norm(ADDRESS(const float, 0), ADDRESS(const float, 1), ADDRESS(float, 2), ints[3], ints[4],
             (float)floats[0]);
    return 1;
}

KERNEL(layer_norm, 6, 1) {
    layer_norm(ADDRESS(const float, 0), ADDRESS(const float, 1), ADDRESS(const float, 2),
               ADDRESS(float, 3), ints[4], ints[5], (float)floats[0]);
    return 1;
}

KERNEL(norm_heads, 8, 1) {
    norm_heads(ADDRESS(float, 0), ints[1], ints[2], ints[3], ints[4], ADDRESS(const float, 5),
               ints[6], (int)ints[7], (float)floats[0]);
    return 1;
}

KERNEL(add_residual, 4, 1) {
    add_residual(ADDRESS(const float, 0), ADDRESS(const float, 1), ADDRESS(float, 2), ints[3],
                 (float)floats[0]);
    return 1;
}

KERNEL(scale_tokens, 5, 0) {
    (void)floats;
    scale_tokens(ADDRESS(float, 0), ints[1], ints[2], ints[3], ADDRESS(const float, 4));
    return 1;
}

KERNEL(apply_rotary_emb, 9, 0) {
    (void)floats;
    apply_rotary_emb(ADDRESS(float, 0), ints[1], ints[2], ints[3], ints[4],
                     ADDRESS(const float, 5), ADDRESS(const float, 6), ints[7], (int)ints[8]);
    return 1;
}

KERNEL(store_kv, 8, 0) {
    (void)floats;
    store_kv(ADDRESS(const float, 0), ints[1], ints[2], ints[3], ints[4],
             ADDRESS(const int64_t, 5), ADDRESS(float, 6), ints[7]);
    return 1;
}

KERNEL(act_and_mul, 5, 0) {
    (void)floats;
    act_and_mul(ADDRESS(const float, 0), ADDRESS(float, 1), ints[2], ints[3], (int)ints[4]);
    return 1;
}

KERNEL(act, 4, 0) {
    (void)floats;
    act(ADDRESS(const float, 0), ADDRESS(float, 1), ints[2], (int)ints[3]);
    return 1;
}

KERNEL(xielu, 7, 0) {
    (void)floats;
    xielu(ADDRESS(const float, 0), ADDRESS(float, 1), ints[2], ADDRESS(const float, 3),
          ADDRESS(const float, 4), ADDRESS(const float, 5), ADDRESS(const float, 6));
    return 1;
}

KERNEL(swiglu_clamped, 4, 2) {
    swiglu_clamped(ADDRESS(const float, 0), ADDRESS(float, 1), ints[2], ints[3], (float)floats[0],
                   (float)floats[1]);
    return 1;
}

#define FOR_EACH_KERNEL(DO)                                                                        \
    DO(linear)                                                                                     \
    DO(linear_w8a8)                                                                                \
    DO(paged_attention)                                                                            \
    DO(rms_norm)                                                                                   \
    DO(layer_norm)                                                                                 \
    DO(norm_heads)                                                                                 \
    DO(add_residual)                                                                               \
    DO(scale_tokens)                                                                               \
    DO(apply_rotary_emb)                                                                           \
    DO(store_kv)                                                                                   \
    DO(act)                                                                                        \
    DO(xielu)                                                                                      \
    DO(act_and_mul)                                                                                \
    DO(swiglu_clamped)

typedef struct {
    const char *name;
    KernelFunction run;
    int n_ints;
    int n_floats;
} Kernel;

#define KERNEL_ROW(NAME) {#NAME, run_##NAME, NAME##_n_ints, NAME##_n_floats},
static const Kernel kernels[] = {FOR_EACH_KERNEL(KERNEL_ROW)};

static const Kernel *find_kernel(const char *name) {
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (strcmp(kernels[i].name, name) == 0)
            return &kernels[i];
    return NULL;
}

/* Convert a pair (name, arguments) into a call. Returns 0 with an exception set on failure. */
static int parse_call(PyObject *item, Call *call) {
    const char *name;
    PyObject *arguments;
    if (!PyArg_ParseTuple(item, "sO!", &name, &PyTuple_Type, &arguments))
        return 0;
    const Kernel *kernel = find_kernel(name);
    if (kernel == NULL) {
        PyErr_Format(PyExc_ValueError, "there is no kernel %s", name);
        return 0;
    }
    memset(call, 0, sizeof *call);
    call->run = kernel->run;
    return parse_numbers(PySequence_Fast_ITEMS(arguments), PyTuple_GET_SIZE(arguments), call->ints,
                         kernel->n_ints, call->floats, kernel->n_floats);
}

/* program([(name, arguments), ...]): the calls as bytes, for `run`. */
static PyObject *py_program(PyObject *self, PyObject *list) {
    (void)self;
    if (!PyList_Check(list))
        return PyErr_Format(PyExc_TypeError, "a list of calls was expected");
    Py_ssize_t n_calls = PyList_GET_SIZE(list);
    PyObject *program = PyBytes_FromStringAndSize(NULL, n_calls * (Py_ssize_t)sizeof(Call));
    if (program == NULL)
        return NULL;
    Call *calls = (Call *)PyBytes_AS_STRING(program);
    for (Py_ssize_t i = 0; i < n_calls; i++)
        if (!parse_call(PyList_GET_ITEM(list, i), &calls[i])) {
            Py_DECREF(program);
            return NULL;
        }
    return program;
}

/* run(program): make the calls, in order. */
static PyObject *py_run(PyObject *self, PyObject *program) {
    (void)self;
    if (!PyBytes_Check(program))
        return PyErr_Format(PyExc_TypeError, "a program was expected");
    const Call *calls = (const Call *)PyBytes_AS_STRING(program);
    return run_calls(calls, PyBytes_GET_SIZE(program) / (Py_ssize_t)sizeof(Call));
}

/* supported(): whether this processor has the instructions that the kernels use. */
static PyObject *py_supported(PyObject *self, PyObject *none) {
    (void)self;
    (void)none;
    return PyBool_FromLong(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c"));
}

#define KERNEL_METHOD(NAME) {#NAME, (PyCFunction)(void (*)(void))py_##NAME, METH_FASTCALL, NULL},
static PyMethodDef methods[] = {
    FOR_EACH_KERNEL(KERNEL_METHOD)
    {"program", py_program, METH_O, NULL},
    {"run", py_run, METH_O, NULL},
    {"supported", py_supported, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_cpu_kernels",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__cpu_kernels(void) {
    return PyModule_Create(&module);
}
