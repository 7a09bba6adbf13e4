/* The Python module llmkit.kernels.cpu._cpu_kernels. It also runs programs: recorded kernel calls
 * that are repeated without returning to Python in between. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "cpu_kernels.h"
#include "shared_reduce.h"
#include "thread_pool.h"

/* The functions of the level in use. */
static const Kernels *kernels = NULL;

/* Every kernel takes integers (some of them addresses), then floats. */
enum { MAX_INTS = 20, MAX_FLOATS = 2 };

/* Returns 1, 0 when out of memory, or COLLECTIVE_STOPPED. */
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
    int result = 1;
    Py_BEGIN_ALLOW_THREADS
    for (int64_t i = 0; result == 1 && i < n_calls; i++)
        result = calls[i].run(calls[i].ints, calls[i].floats);
    Py_END_ALLOW_THREADS
    if (result == COLLECTIVE_STOPPED)
        return PyErr_Format(PyExc_RuntimeError, "another rank has ended or does not answer");
    if (!result)
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

KERNEL(linear, 17, 0) {
    (void)floats;
    return kernels->linear(&(Linear){
        .weight_type = (int)ints[0],
        .inputs = (int)ints[1],
        .scale_type = (int)ints[2],
        .x = ADDRESS(const float, 3),
        .x_stride = ints[4],
        .weight = ADDRESS(const char, 5),
        .scales = ADDRESS(const void, 6),
        .scale_factors = ADDRESS(const float, 7),
        .offsets = ADDRESS(const float, 8),
        .bias = ADDRESS(const float, 9),
        .y = ADDRESS(float, 10),
        .y_stride = ints[11],
        .rows = ints[12],
        .cols = ints[13],
        .depth = ints[14],
        .group_size = ints[15],
        .input_scale = ADDRESS(const float, 16),
    });
}

/* The arguments that both kernels of a compression have. */
static Bf16Compression compression(const int64_t *ints) {
    return (Bf16Compression){
        .panels = ADDRESS(const char, 0),
        .n_panels = ints[1],
        .depth = ints[2],
        .top_exponents = ADDRESS(int32_t, 3),
        .n_uncompressed = ADDRESS(int32_t, 4),
    };
}

KERNEL(measure_bf16, 5, 0) {
    (void)floats;
    const Bf16Compression arguments = compression(ints);
    return kernels->measure_bf16(&arguments);
}

KERNEL(compress_bf16, 7, 0) {
    (void)floats;
    Bf16Compression arguments = compression(ints);
    arguments.uncompressed_starts = ADDRESS(const int64_t, 5);
    arguments.to = ADDRESS(char, 6);
    return kernels->compress_bf16(&arguments);
}

KERNEL(head_linear, 12, 0) {
    (void)floats;
    return kernels->head_linear(&(HeadLinear){
        .first =
            {
                .weight_type = (int)ints[0],
                .inputs = INPUTS_F32,
                .x = ADDRESS(const float, 1),
                .x_stride = ints[2],
                .weight = ADDRESS(const char, 4),
                .y = ADDRESS(float, 5),
                .y_stride = ints[6],
                .rows = ints[8],
                .cols = ints[9],
                .depth = ints[10],
                .group_size = ints[10],
            },
        .x_head_stride = ints[3],
        .y_head_stride = ints[7],
        .n_heads = ints[11],
    });
}

KERNEL(paged_attention, 19, 2) {
    return kernels->paged_attention(&(PagedAttention){
        .q = ADDRESS(const float, 0),
        .out = ADDRESS(float, 1),
        .q_stride = ints[2],
        .kv_type = (int)ints[3],
        .kv = ADDRESS(const char, 4),
        .scales = ADDRESS(const float, 5),
        .static_scales = (int)ints[6],
        .head_stride = ints[7],
        .block_size = ints[8],
        .head_dim = ints[9],
        .value_dim = ints[9],
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
    });
}

KERNEL(latent_attention, 15, 1) {
    return kernels->paged_attention(&(PagedAttention){
        .q = ADDRESS(const float, 0),
        .out = ADDRESS(float, 1),
        .q_stride = ints[2],
        .kv_type = (int)ints[3],
        .kv = ADDRESS(const char, 4),
        .block_size = ints[5],
        .head_dim = ints[6],
        .value_dim = ints[7],
        .is_latent = 1,
        .n_heads = ints[8],
        .n_kv_heads = ints[9],
        .n_sequences = ints[10],
        .query_lens = ADDRESS(const int64_t, 11),
        .seq_lens = ADDRESS(const int64_t, 12),
        .block_tables = ADDRESS(const int64_t, 13),
        .table_starts = ADDRESS(const int64_t, 14),
        .scale = (float)floats[0],
    });
}

KERNEL(norm, 10, 2) {
    return kernels->norm(&(Norm){
        .x = ADDRESS(const float, 0),
        .update = ADDRESS(const float, 7),
        .sum = ADDRESS(float, 8),
        .scale = (float)floats[1],
        .weight = ADDRESS(const float, 1),
        .bias = ADDRESS(const float, 2),
        .y = ADDRESS(float, 3),
        .rows = ints[4],
        .hidden_size = ints[5],
        .subtract_mean = (int)ints[6],
        .rounds = (int)ints[9],
        .eps = (float)floats[0],
    });
}

KERNEL(norm_heads, 8, 1) {
    return kernels->norm_heads(&(HeadNorm){
        .x = ADDRESS(float, 0),
        .x_stride = ints[1],
        .n_tokens = ints[2],
        .n_heads = ints[3],
        .head_dim = ints[4],
        .weight = ADDRESS(const float, 5),
        .weight_stride = ints[6],
        .subtract_mean = (int)ints[7],
        .eps = (float)floats[0],
    });
}

KERNEL(add_residual, 4, 1) {
    return kernels->add_residual(&(Residual){
        .residual = ADDRESS(const float, 0),
        .update = ADDRESS(const float, 1),
        .y = ADDRESS(float, 2),
        .size = ints[3],
        .scale = (float)floats[0],
    });
}

KERNEL(scale_tokens, 5, 0) {
    (void)floats;
    return kernels->scale_tokens(&(TokenScales){
        .x = ADDRESS(float, 0),
        .x_stride = ints[1],
        .n_tokens = ints[2],
        .size = ints[3],
        .factors = ADDRESS(const float, 4),
    });
}

KERNEL(apply_rotary_emb, 9, 0) {
    (void)floats;
    return kernels->apply_rotary_emb(&(Rotary){
        .x = ADDRESS(float, 0),
        .x_stride = ints[1],
        .n_tokens = ints[2],
        .n_heads = ints[3],
        .head_stride = ints[4],
        .cos = ADDRESS(const float, 5),
        .sin = ADDRESS(const float, 6),
        .half = ints[7],
        .interleaved = (int)ints[8],
    });
}

KERNEL(store_kv, 11, 0) {
    (void)floats;
    return kernels->store_kv(&(StoreKv){
        .kv = ADDRESS(const float, 0),
        .kv_stride = ints[1],
        .n_tokens = ints[2],
        .n_heads = ints[3],
        .head_dim = ints[4],
        .slot_mapping = ADDRESS(const int64_t, 5),
        .kv_type = (int)ints[6],
        .cache = ADDRESS(char, 7),
        .head_stride = ints[8],
        .scales = ADDRESS(float, 9),
        .static_scales = (int)ints[10],
    });
}

KERNEL(act_and_mul, 5, 2) {
    return kernels->act_and_mul(&(Activation){
        .x = ADDRESS(const float, 0),
        .y = ADDRESS(float, 1),
        .rows = ints[2],
        .size = ints[3],
        .activation = (int)ints[4],
        .limit = (float)floats[0],
        .alpha = (float)floats[1],
    });
}

KERNEL(act, 5, 0) {
    (void)floats;
    return kernels->act(&(Activation){
        .x = ADDRESS(const float, 0),
        .y = ADDRESS(float, 1),
        .rows = ints[2],
        .size = ints[3],
        .activation = (int)ints[4],
    });
}

KERNEL(xielu, 7, 0) {
    (void)floats;
    return kernels->xielu(&(Xielu){
        .x = ADDRESS(const float, 0),
        .y = ADDRESS(float, 1),
        .size = ints[2],
        .raw_alpha_p = ADDRESS(const float, 3),
        .raw_alpha_n = ADDRESS(const float, 4),
        .beta = ADDRESS(const float, 5),
        .eps = ADDRESS(const float, 6),
    });
}

KERNEL(apply_gate, 8, 0) {
    (void)floats;
    return kernels->apply_gate(&(Gate){
        .x = ADDRESS(const float, 0),
        .gate = ADDRESS(const float, 1),
        .gate_stride = ints[2],
        .y = ADDRESS(float, 3),
        .rows = ints[4],
        .size = ints[5],
        .per_row = (int)ints[6],
        .activation = (int)ints[7],
    });
}

KERNEL(copy_rows, 6, 0) {
    (void)floats;
    return kernels->copy_rows(&(RowCopy){
        .from = ADDRESS(const float, 0),
        .from_stride = ints[1],
        .to = ADDRESS(float, 2),
        .to_stride = ints[3],
        .rows = ints[4],
        .size = ints[5],
    });
}

KERNEL(select_experts, 13, 2) {
    return kernels->select_experts(&(Router){
        .logits = ADDRESS(const float, 0),
        .correction_bias = ADDRESS(const float, 1),
        .expert_scales = ADDRESS(const float, 2),
        .weights = ADDRESS(float, 3),
        .ids = ADDRESS(int64_t, 4),
        .n_tokens = ints[5],
        .n_experts = ints[6],
        .n_chosen = ints[7],
        .n_groups = ints[8],
        .topk_groups = ints[9],
        .sigmoid = (int)ints[10],
        .normalize = (int)ints[11],
        .group_max = (int)ints[12],
        .softcap = (float)floats[0],
        .scaling_factor = (float)floats[1],
    });
}

KERNEL(experts, 12, 2) {
    return kernels->experts(&(Experts){
        .x = ADDRESS(const float, 0),
        .y = ADDRESS(float, 1),
        .ids = ADDRESS(const int64_t, 2),
        .weights = ADDRESS(const float, 3),
        .n_tokens = ints[4],
        .n_chosen = ints[5],
        .hidden_size = ints[6],
        .intermediate_size = ints[7],
        .linears = (const ExpertLinear(*)[2])(intptr_t)ints[8],
        .n_experts = ints[9],
        .gated = (int)ints[10],
        .activation = (int)ints[11],
        .limit = (float)floats[0],
        .alpha = (float)floats[1],
    });
}

KERNEL(gated_mlp, 7, 2) {
    return kernels->gated_mlp(&(GatedMlp){
        .x = ADDRESS(const float, 0),
        .x_stride = ints[1],
        .y = ADDRESS(float, 2),
        .rows = ints[3],
        .linears = ADDRESS(const ExpertLinear, 4),
        .activation = (int)ints[5],
        .x_is_rounded = (int)ints[6],
        .limit = (float)floats[0],
        .alpha = (float)floats[1],
    });
}

/* Six integers: a RecurrentBatch's host_addresses. */
#define RECURRENT_ROWS(I)                                                                          \
    ((RecurrentRows){                                                                              \
        .n_sequences = ints[I],                                                                    \
        .query_lens = ADDRESS(const int64_t, I + 1),                                               \
        .initial_rows = ADDRESS(const int64_t, I + 2),                                             \
        .write_starts = ADDRESS(const int64_t, I + 3),                                             \
        .write_ends = ADDRESS(const int64_t, I + 4),                                               \
        .write_rows = ADDRESS(const int64_t, I + 5),                                               \
    })

KERNEL(causal_conv, 17, 0) {
    (void)floats;
    return kernels->causal_conv(&(CausalConv){
        .x = ADDRESS(const float, 0),
        .x_stride = ints[1],
        .weight = ADDRESS(const float, 2),
        .bias = ADDRESS(const float, 3),
        .state = ADDRESS(float, 4),
        .y = ADDRESS(float, 5),
        .n_tokens = ints[6],
        .n_channels = ints[7],
        .width = ints[8],
        .silu = (int)ints[9],
        .gated = (int)ints[10],
        .rows = RECURRENT_ROWS(11),
    });
}

KERNEL(mamba2_scan, 20, 2) {
    return kernels->mamba2_scan(&(Mamba2Scan){
        .xbc = ADDRESS(const float, 0),
        .xbc_stride = ints[1],
        .dt = ADDRESS(const float, 2),
        .dt_stride = ints[3],
        .A_log = ADDRESS(const float, 4),
        .D = ADDRESS(const float, 5),
        .dt_bias = ADDRESS(const float, 6),
        .state = ADDRESS(float, 7),
        .y = ADDRESS(float, 8),
        .n_tokens = ints[9],
        .n_heads = ints[10],
        .head_dim = ints[11],
        .state_size = ints[12],
        .n_groups = ints[13],
        .rows = RECURRENT_ROWS(14),
        .min_dt = (float)floats[0],
        .max_dt = (float)floats[1],
    });
}

KERNEL(gated_delta_rule, 19, 0) {
    (void)floats;
    return kernels->gated_delta_rule(&(GatedDeltaRule){
        .qkv = ADDRESS(const float, 0),
        .qkv_stride = ints[1],
        .ba = ADDRESS(const float, 2),
        .ba_stride = ints[3],
        .A_log = ADDRESS(const float, 4),
        .dt_bias = ADDRESS(const float, 5),
        .out = ADDRESS(float, 6),
        .state = ADDRESS(float, 7),
        .row_stride = ints[8],
        .n_k_heads = ints[9],
        .n_v_heads = ints[10],
        .k_dim = ints[11],
        .v_dim = ints[12],
        .rows = RECURRENT_ROWS(13),
    });
}

KERNEL(gated_group_rms_norm, 10, 1) {
    return kernels->gated_group_rms_norm(&(GatedGroupNorm){
        .x = ADDRESS(const float, 0),
        .gate = ADDRESS(const float, 1),
        .gate_stride = ints[2],
        .weight = ADDRESS(const float, 3),
        .y = ADDRESS(float, 4),
        .rows = ints[5],
        .size = ints[6],
        .n_groups = ints[7],
        .weight_stride = ints[8],
        .norm_before_gate = (int)ints[9],
        .eps = (float)floats[0],
    });
}

KERNEL(all_reduce, 5, 0) {
    (void)floats;
    return all_reduce_shared(&(SharedGroup){ADDRESS(char, 0), ints[1], ints[2]}, ADDRESS(float, 3),
                             ints[4]);
}

KERNEL(all_gather, 6, 0) {
    (void)floats;
    return all_gather_shared(&(SharedGroup){ADDRESS(char, 0), ints[1], ints[2]},
                             ADDRESS(const char, 3), ints[4], ADDRESS(char, 5));
}

KERNEL(argmax, 6, 0) {
    (void)floats;
    return kernels->argmax(&(Argmax){
        .x = ADDRESS(const float, 0),
        .x_stride = ints[1],
        .rows = ints[2],
        .cols = ints[3],
        .ids = ADDRESS(int64_t, 4),
        .is_finite = ADDRESS(uint8_t, 5),
    });
}

#define FOR_EACH_KERNEL(DO)                                                                        \
    DO(linear)                                                                                     \
    DO(measure_bf16)                                                                               \
    DO(compress_bf16)                                                                              \
    DO(head_linear)                                                                                \
    DO(paged_attention)                                                                            \
    DO(latent_attention)                                                                           \
    DO(norm)                                                                                       \
    DO(norm_heads)                                                                                 \
    DO(add_residual)                                                                               \
    DO(scale_tokens)                                                                               \
    DO(apply_rotary_emb)                                                                           \
    DO(store_kv)                                                                                   \
    DO(act_and_mul)                                                                                \
    DO(act)                                                                                        \
    DO(xielu)                                                                                      \
    DO(apply_gate)                                                                                 \
    DO(copy_rows)                                                                                  \
    DO(select_experts)                                                                             \
    DO(experts)                                                                                    \
    DO(gated_mlp)                                                                                  \
    DO(causal_conv)                                                                                \
    DO(mamba2_scan)                                                                                \
    DO(gated_delta_rule)                                                                           \
    DO(gated_group_rms_norm)                                                                       \
    DO(argmax)                                                                                     \
    DO(all_reduce)                                                                                 \
    DO(all_gather)

typedef struct {
    const char *name;
    KernelFunction run;
    int n_ints;
    int n_floats;
} NamedKernel;

#define KERNEL_ROW(NAME) {#NAME, run_##NAME, NAME##_n_ints, NAME##_n_floats},
static const NamedKernel named_kernels[] = {FOR_EACH_KERNEL(KERNEL_ROW)};

static const NamedKernel *find_kernel(const char *name) {
    for (size_t i = 0; i < sizeof named_kernels / sizeof *named_kernels; i++)
        if (strcmp(named_kernels[i].name, name) == 0)
            return &named_kernels[i];
    return NULL;
}

/* Convert a pair (name, arguments) into a call. Returns 0 with an exception set on failure. */
static int parse_call(PyObject *item, Call *call) {
    const char *name;
    PyObject *arguments;
    if (!PyArg_ParseTuple(item, "sO!", &name, &PyTuple_Type, &arguments))
        return 0;
    const NamedKernel *kernel = find_kernel(name);
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

/* ---- levels ---- */

/* levels(): the names of the levels that this processor has, the fastest last. */
static PyObject *py_levels(PyObject *self, PyObject *none) {
    (void)self;
    (void)none;
    PyObject *names = PyList_New(0);
    for (int i = 0; names && levels[i].kernels; i++) {
        if (!levels[i].is_supported())
            continue;
        PyObject *name = PyUnicode_FromString(levels[i].kernels->name);
        if (name == NULL || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* set_level(name): use the functions of this level. */
static PyObject *py_set_level(PyObject *self, PyObject *name) {
    (void)self;
    for (int i = 0; levels[i].kernels; i++)
        if (PyUnicode_Check(name) &&
            PyUnicode_CompareWithASCIIString(name, levels[i].kernels->name) == 0 &&
            levels[i].is_supported()) {
            kernels = levels[i].kernels;
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "this processor has no level %R", name);
}

/* has_bfloat16(): whether the level multiplies bfloat16. */
static PyObject *py_has_bfloat16(PyObject *self, PyObject *none) {
    (void)self;
    (void)none;
    return PyBool_FromLong(kernels && kernels->has_bfloat16);
}

/* has_compression(): whether the level takes WEIGHT_BF16_COMPRESSED. */
static PyObject *py_has_compression(PyObject *self, PyObject *none) {
    (void)self;
    (void)none;
    return PyBool_FromLong(kernels && kernels->compress_bf16 != NULL);
}

/* set_num_threads(n): how many threads the kernels use. */
static PyObject *py_set_num_threads(PyObject *self, PyObject *n) {
    (void)self;
    long value = PyLong_AsLong(n);
    if (value == -1 && PyErr_Occurred())
        return NULL;
    set_num_threads((int)value);
    Py_RETURN_NONE;
}

static PyObject *py_num_threads(PyObject *self, PyObject *none) {
    (void)self;
    (void)none;
    return PyLong_FromLong(num_threads());
}

/* shared_memory_bytes(num_ranks): the size of the memory that all_reduce and all_gather share. */
static PyObject *py_shared_memory_bytes(PyObject *self, PyObject *num_ranks) {
    (void)self;
    long value = PyLong_AsLong(num_ranks);
    if (value == -1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromLongLong(shared_memory_bytes(value));
}

/* stop_ranks(address): let the collective operations over this memory fail from now on. */
static PyObject *py_stop_ranks(PyObject *self, PyObject *address) {
    (void)self;
    void *memory = PyLong_AsVoidPtr(address);
    if (memory == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "an address was expected");
        return NULL;
    }
    stop_shared(memory);
    Py_RETURN_NONE;
}

#define KERNEL_METHOD(NAME) {#NAME, (PyCFunction)(void (*)(void))py_##NAME, METH_FASTCALL, NULL},
static PyMethodDef methods[] = {
    FOR_EACH_KERNEL(KERNEL_METHOD)
    {"program", py_program, METH_O, NULL},
    {"run", py_run, METH_O, NULL},
    {"levels", py_levels, METH_NOARGS, NULL},
    {"set_level", py_set_level, METH_O, NULL},
    {"has_bfloat16", py_has_bfloat16, METH_NOARGS, NULL},
    {"has_compression", py_has_compression, METH_NOARGS, NULL},
    {"set_num_threads", py_set_num_threads, METH_O, NULL},
    {"num_threads", py_num_threads, METH_NOARGS, NULL},
    {"shared_memory_bytes", py_shared_memory_bytes, METH_O, NULL},
    {"stop_ranks", py_stop_ranks, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_cpu_kernels",
    .m_size = -1,
    .m_methods = methods,
};

/* Keep freed memory instead of giving it back to the system. Steps allocate the same tensors again
 * and again, and every page that comes from the system is first filled with zeros. */
static void keep_freed_memory(void) {
#if defined(__GLIBC__)
    enum { LARGEST_KEPT = 1 << 25, MOST_KEPT = 1 << 29 };
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT);
    mallopt(M_TRIM_THRESHOLD, MOST_KEPT);
#endif
}

PyMODINIT_FUNC PyInit__cpu_kernels(void) {
    keep_freed_memory();
    return PyModule_Create(&module);
}
