// Keeps the conversation over a reload, in this browser only. The API key is never part of it.
//
// A tab finds its own conversation in sessionStorage. A new tab begins with the last one of all
// tabs, which is in localStorage.

const CONVERSATION = "llmkit-conversation";
const SWITCH = "llmkit-keep"; // "no": nothing is kept

/** Whether conversations are kept. */
export function isKept() {
  try {
    return localStorage.getItem(SWITCH) !== "no";
  } catch {
    return false; // the browser forbids storage
  }
}

/** Turn keeping on or off. Off also deletes what was kept. */
export function setKept(kept) {
  try {
    if (kept) localStorage.removeItem(SWITCH);
    else localStorage.setItem(SWITCH, "no");
  } catch {
    // Without storage nothing is kept anyway.
  }
  if (!kept) forget();
}

/** Keep a conversation. Returns false if the browser has no room for it. */
export function save(conversation) {
  const text = JSON.stringify(conversation);
  try {
    for (const storage of [sessionStorage, localStorage]) storage.setItem(CONVERSATION, text);
    return true;
  } catch {
    return false;
  }
}

/** Delete the conversation. */
export function forget() {
  try {
    for (const storage of [sessionStorage, localStorage]) storage.removeItem(CONVERSATION);
  } catch {
    // Without storage there is nothing to delete.
  }
}

/**
 * Return the kept conversation: { turns: [...], settings: { name: value } }; null without one.
 * What does not have this form, as another version may have left it, counts as none.
 */
export function load() {
  try {
    if (!isKept()) {
      forget(); // another tab has turned keeping off
      return null;
    }
    const text = sessionStorage.getItem(CONVERSATION) ?? localStorage.getItem(CONVERSATION);
    const { turns, settings } = JSON.parse(text);
    const areTurns = turns.every(
      (turn) => typeof turn.user === "string" && typeof turn.answer === "string",
    );
    return areTurns && typeof settings === "object" ? { turns, settings: settings ?? {} } : null;
  } catch {
    return null;
  }
}
