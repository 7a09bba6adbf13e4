// The server, as this page talks to it.

const KEY = "llmkit-api-key";

/** What the server answered instead of what was asked for; status 0: nothing at all. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const useKey = (key) => sessionStorage.setItem(KEY, key);

/** Fetch `path`. Throws ApiError, or AbortError when `options.signal` says so. A 401 is an event of the document. */
export async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key !== null) headers.set("authorization", `Bearer ${key}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) document.dispatchEvent(new Event("keyneeded"));
  throw await errorOf(answer);
}

export const getJson = async (path) => (await request(path)).json();

/** The JSON of each server-sent event, as it comes, until the stream ends. Throws ApiError for an error event. */
export async function* stream(path, body, signal) {
  const answer = await request(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "The answer broke off.");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
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

async function errorOf(answer) {
  let message = `${answer.status} ${answer.statusText}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // not an envelope of ours
  }
  return new ApiError(answer.status, message);
}
