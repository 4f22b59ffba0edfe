// The page's frame: header, navigation, the view that the address names, and what floats above.
import { apiKey, keyWanted } from "./api.js";
import { KeyEntry } from "./components/key_entry.js";
import { Problem } from "./components/problem.js";
import { EnrollView } from "./enroll/view.js";
import { GalleryView } from "./gallery/view.js";
import { ItemView } from "./gallery/item.js";
import { go, href, route } from "./router.js";
import { take } from "./search/pick.js";
import { SearchView } from "./search/view.js";
import { announcement, refreshModel, theme } from "./state.js";
import { TimelineView } from "./timeline/view.js";
import { effect, html, render, useErrorBoundary } from "./ui.js";

const VIEWS = {
  search: ["Search", SearchView],
  gallery: ["Gallery", GalleryView],
  enroll: ["Enroll", EnrollView],
  timeline: ["Timeline", TimelineView],
  item: ["Item", ItemView],
};
const NAVIGATION = ["search", "gallery", "timeline", "enroll"];
const THEMES = { auto: "System", light: "Light", dark: "Dark" };

/** The name of the view that the address means; what is none of them means the first. */
const viewName = () => (Object.hasOwn(VIEWS, route.value.view) ? route.value.view : "search");

function Header({ view }) {
  return html`
    <header class="top">
      <a class="skip" href="#main" onClick=${toMain}>Skip to content</a>
      <a class="brand" href=${href("search")}><span class="mark" aria-hidden="true"></span>CMT</a>
      <nav aria-label="Views">
        ${NAVIGATION.map((name) => html`
          <a key=${name} href=${href(name)} aria-current=${name === view ? "page" : null}>${VIEWS[name][0]}</a>`)}
      </nav>
      <div class="top-end">
        <button type="button" class="button quiet" onClick=${() => { keyWanted.value = { detail: "" }; }}>
          ${apiKey.value ? "Key set" : "Key"}</button>
        <label class="theme"><span class="visually-hidden">Theme</span>
          <select value=${theme.value} onChange=${(event) => { theme.value = event.target.value; }}>
            ${Object.entries(THEMES).map(([value, name]) => html`<option key=${value} value=${value}>${name}</option>`)}
          </select>
        </label>
      </div>
    </header>`;
}

// The hash is the route, so a link within the page moves the focus by script.
function toMain(event) {
  event.preventDefault();
  document.querySelector("main").focus();
}

// A file that is dropped where no view takes it would be opened in place of the page.
const withFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => { if (withFiles(event)) event.preventDefault(); });
addEventListener("drop", (event) => {
  if (!withFiles(event)) return;
  event.preventDefault();
  if (["search", "enroll"].includes(viewName()) || document.querySelector("dialog[open]")) return;
  take(event.dataTransfer);
  go("search");
});

// Where what had the focus is gone, the view gets it; else the keyboard begins at the top again.
function keepFocus(root) {
  let latest = null;
  addEventListener("focusin", ({ target }) => { latest = target; });
  new MutationObserver(() => {
    if (document.activeElement !== document.body || !latest || latest.isConnected) return;
    latest = null;
    document.querySelector("main")?.focus({ preventScroll: true });
  }).observe(root, { childList: true, subtree: true });
}

function View({ name, id }) {
  const [failure, reset] = useErrorBoundary((error) => console.error(error));
  if (failure) return html`<${Problem} error=${failure} onRetry=${reset} />`;
  const [, Shown] = VIEWS[name];
  return html`<${Shown} id=${id} parameters=${route.value.parameters} />`;
}

function App() {
  const { id } = route.value;
  const name = viewName();
  return html`
    <${Header} view=${name} />
    <main id="main" tabindex="-1"><${View} key=${name} name=${name} id=${id} /></main>
    <div class="visually-hidden" aria-live="polite" data-testid="announcement">${announcement.value}</div>
    <${KeyEntry} />`;
}

effect(() => {
  const [title] = VIEWS[viewName()];
  document.title = `${title} · CMT`;
});
const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
keepFocus(root);
refreshModel();
