// The page's start: views, the key, the models.

import { getJson, hasKey, useKey } from "./api.js";
import { Chat } from "./chat.js";
import { Dashboard } from "./dashboard.js";
import { byId, make } from "./dom.js";

const RETRY_MS = 2000;
const TABS = ["chat", "dashboard"];

new Chat();
const dashboard = new Dashboard((error) => say(error ? told(error) : "Ready", error !== null));
const told = (error) => (error.status === 401 ? "A key is needed" : error.message);

function say(text, wrong = false) {
  const status = byId("server");
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle("wrong", wrong);
}

/** Ask for the models until the server has them. */
async function connect() {
  try {
    const { data } = await getJson("/v1/models");
    byId("model").replaceChildren(...data.map(({ id }) => make("option", { value: id }, id)));
    say("Ready");
    byId("key-form").hidden = true;
    const { defaults } = await getJson("/info");
    for (const name of ["temperature", "top_p"]) byId(name).placeholder = defaults[name];
    byId("top_k").placeholder = defaults.top_k || "all";
  } catch (error) {
    say(told(error), true);
    if (error.status === 0 || error.status === 503) setTimeout(connect, RETRY_MS);
  }
}

document.addEventListener("keyneeded", () => {
  if (!byId("key-form").hidden) return;
  if (hasKey()) byId("key-note").textContent = "The server does not know that key.";
  byId("key-form").hidden = false;
  byId("key").focus();
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  byId("key").value = "";
  byId("key-form").hidden = true;
  connect();
  select(current());
});

const current = () => (location.hash === "#dashboard" ? "dashboard" : "chat");

function select(name) {
  for (const tab of TABS) {
    const button = byId(`tab-${tab}`);
    button.setAttribute("aria-selected", String(tab === name));
    button.tabIndex = tab === name ? 0 : -1;
    byId(tab).hidden = tab !== name;
  }
  dashboard.show(name === "dashboard");
}

function choose(name) {
  history.replaceState(null, "", `#${name}`); // the focus stays where it is
  select(name);
}

for (const tab of TABS) {
  const button = byId(`tab-${tab}`);
  button.addEventListener("click", () => choose(tab));
  button.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = TABS[1 - TABS.indexOf(tab)];
    choose(other);
    byId(`tab-${other}`).focus();
  });
}

addEventListener("hashchange", () => select(current()));
const wide = matchMedia("(min-width: 60rem)");
const unfold = () => (byId("settings").open = wide.matches);
wide.addEventListener("change", unfold);
unfold();
select(current());
connect();
