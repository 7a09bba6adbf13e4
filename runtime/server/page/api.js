// Requests to the server.

const KEY_NAME = "llmkit-api-key";

/** An error response. status 0: there was no response, or it broke off. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const hasKey = () => sessionStorage.getItem(KEY_NAME) !== null;
export const useKey = (key) => sessionStorage.setItem(KEY_NAME, key);

/**
 * Fetch `path` with the API key. Throws ApiError, or AbortError when `options.signal` aborts.
 * A 401 also dispatches the event "keyneeded" on the document.
 */
export async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY_NAME);
  if (key !== null) headers.set("authorization", `Bearer ${key}`);
  const settings = { headers, credentials: "omit", cache: "no-store", redirect: "error" };
  let response;
  try {
    response = await fetch(path, { ...options, ...settings });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) document.dispatchEvent(new Event("keyneeded"));
  throw await errorOf(response);
}

export const getJson = async (path) => (await request(path)).json();

/** Yield the JSON of each server-sent event of a stream. Throws ApiError for an error event. */
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "The answer broke off.");
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop(); // an incomplete event
    for (const event of events) {
      const data = event.startsWith("data: ") ? event.slice(6) : "";
      if (data === "[DONE]") return;
      if (!data) continue;
      const document = JSON.parse(data);
      if (document.error) throw new ApiError(0, document.error.message);
      yield document;
    }
  }
}

async function errorOf(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // The body is not one of the server's errors: a proxy may have sent it.
  }
  return new ApiError(response.status, message);
}
