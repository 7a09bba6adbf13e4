// The start of the page: views, the API key and the list of models.

import { getJson, hasKey, useKey } from "./api.js";
import { Chat } from "./chat.js";
import { Dashboard } from "./dashboard.js";
import { byId, make } from "./dom.js";

const RETRY_MS = 2000;
const TABS = ["chat", "dashboard"];

const chat = new Chat();
const dashboard = new Dashboard((error) => {
  showStatus(error ? errorText(error) : "Ready", error !== null);
});
const errorText = (error) => (error.status === 401 ? "A key is needed" : error.message);

function showStatus(text, isError = false) {
  const status = byId("server");
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle("wrong", isError);
}

/** Load the list of models. Try again while the server starts or cannot be reached. */
async function connect() {
  try {
    const { data } = await getJson("/v1/models");
    byId("model").replaceChildren(...data.map(({ id }) => make("option", { value: id }, id)));
    chat.showApi(byId("model").value);
    showStatus("Ready");
    byId("key-form").hidden = true;
    const { defaults } = await getJson("/info");
    for (const name of ["temperature", "top_p"]) byId(name).placeholder = defaults[name];
    byId("top_k").placeholder = defaults.top_k || "all";
  } catch (error) {
    showStatus(errorText(error), true);
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
  showTab(currentTab());
});

byId("model").addEventListener("change", () => chat.showApi(byId("model").value));

const currentTab = () => (location.hash === "#dashboard" ? "dashboard" : "chat");

function showTab(name) {
  for (const tab of TABS) {
    const button = byId(`tab-${tab}`);
    button.setAttribute("aria-selected", String(tab === name));
    button.tabIndex = tab === name ? 0 : -1;
    byId(tab).hidden = tab !== name;
  }
  dashboard.show(name === "dashboard");
}

function selectTab(name) {
  history.replaceState(null, "", `#${name}`); // unlike location.hash, this keeps the focus
  showTab(name);
}

for (const tab of TABS) {
  const button = byId(`tab-${tab}`);
  button.addEventListener("click", () => selectTab(tab));
  button.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = TABS[1 - TABS.indexOf(tab)];
    selectTab(other);
    byId(`tab-${other}`).focus();
  });
}

addEventListener("hashchange", () => showTab(currentTab()));
const wideScreen = matchMedia("(min-width: 60rem)");
const openSettings = () => (byId("settings").open = wideScreen.matches);
wideScreen.addEventListener("change", openSettings);
openSettings();
showTab(currentTab());
connect();
