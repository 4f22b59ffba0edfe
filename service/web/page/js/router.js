// The view that the address names: #/search, #/gallery, #/item/ID, #/enroll, #/timeline. What stands
// behind "?" are the view's own parameters, such as #/timeline?person_id=62.
import { signal } from "./ui.js";

function parse() {
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const [view, ...rest] = path.split("/");
  let id = rest.join("/");
  try { id = decodeURIComponent(id); } catch { /* as it stands */ }
  return { view: view || "search", id, parameters: new URLSearchParams(search) };
}

export const route = signal(parse());
addEventListener("hashchange", () => { route.value = parse(); });

/** The address of a view. */
export function href(view, id = "", parameters = {}) {
  const search = new URLSearchParams(parameters).toString();
  return `#/${view}${id && `/${encodeURIComponent(id)}`}${search && `?${search}`}`;
}

/** Stand at a view without a step in the history. */
export function replace(...given) {
  history.replaceState(null, "", href(...given));
  route.value = parse(); // of which no event tells
}

/** Go to a view. */
export const go = (...given) => { location.hash = href(...given); };
