// The API's documentation, made from /openapi.json of this server. Nothing else is loaded.

import { hasKey, request, useKey } from "./api.js";
import { byId, make } from "./dom.js";

/** The schema that a "$ref" names, or the schema itself. */
function resolve(document, schema) {
  const name = schema.$ref?.replace("#/components/schemas/", "");
  return name === undefined ? schema : document.components.schemas[name];
}

/** A type in a few words: "string or null", "list of Message". */
function typeText(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return [...new Set(schema.anyOf.map(typeText))].join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.type === "array") return schema.items ? `list of ${typeText(schema.items)}` : "list";
  return [schema.type ?? "any"].flat().join(" or ");
}

function fieldTable(schema) {
  const required = new Set(schema.required);
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) =>
    make(
      "tr",
      {},
      make("td", {}, make("code", {}, name)),
      make("td", {}, typeText(field)),
      make("td", {}, required.has(name) ? "required" : (field.description ?? "")),
    ),
  );
  const head = ["field", "type", ""].map((text) => make("th", { scope: "col" }, text));
  return make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

/** The parameters of a path and its query, as the schema of an object. */
function parametersSchema(parameters) {
  const fields = parameters.map(({ name, schema, description }) => [
    name,
    { ...schema, description },
  ]);
  const required = parameters.filter((parameter) => parameter.required);
  return {
    properties: Object.fromEntries(fields),
    required: required.map((parameter) => parameter.name),
  };
}

function route(document, path, method, operation) {
  const summary = make("summary", {}, make("strong", {}, method.toUpperCase()), ` ${path}`);
  const parts = [];
  if (operation.parameters) parts.push(fieldTable(parametersSchema(operation.parameters)));
  const content = operation.requestBody?.content["application/json"];
  if (content) {
    const schema = resolve(document, content.schema);
    if (schema.description) parts.push(make("p", {}, schema.description));
    parts.push(fieldTable(schema));
  }
  const types = Object.keys(operation.responses["200"].content).join(", ");
  parts.push(make("p", {}, `Answers with ${types}.`));
  if (operation.security) parts.push(make("p", {}, "Needs an API key."));
  return make("details", {}, summary, ...parts);
}

/** The URL of a file with `text`. A link to the server would be followed without the key. */
const fileUrl = (text) =>
  URL.createObjectURL(new Blob([text], { type: "application/json" }));

/** Whether a path is of the API, and not a file of a page. */
const isApi = (path) => path !== "/" && path !== "/docs" && !path.startsWith("/page/");

async function show() {
  try {
    const text = await (await request("/openapi.json")).text();
    const document = JSON.parse(text);
    const routes = Object.entries(document.paths)
      .filter(([path]) => isApi(path))
      .flatMap(([path, operations]) =>
        Object.entries(operations).map(([method, operation]) =>
          route(document, path, method, operation),
        ),
      );
    const schemas = Object.entries(document.components.schemas)
      .filter(([, schema]) => schema.properties)
      .map(([name, schema]) =>
        make("details", {}, make("summary", {}, name), fieldTable(schema)),
      );
    byId("routes").replaceChildren(
      make(
        "p",
        {},
        "The whole description for programs is at ",
        make("code", {}, "/openapi.json"),
        document.components.securitySchemes.bearer ? " (with the key): " : ": ",
        make("a", { href: fileUrl(text), download: "openapi.json" }, "save it"),
      ),
      make("h2", {}, "Routes"),
      ...routes,
      make("h2", {}, "Objects"),
      ...schemas,
    );
    byId("server").textContent = `${document.info.title} ${document.info.version}`;
    byId("key-form").hidden = true;
  } catch (error) {
    byId("server").textContent = error.status === 401 ? "A key is needed" : error.message;
  }
}

document.addEventListener("keyneeded", () => {
  if (hasKey()) byId("key-note").textContent = "The server does not know that key.";
  byId("key-form").hidden = false;
  byId("key").focus();
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  byId("key").value = "";
  show();
});

show();
