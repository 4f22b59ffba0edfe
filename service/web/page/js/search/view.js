// The search view: what is searched for, how, and the answer.
import { html } from "../ui.js";

export function SearchView() {
  return html`<section class="view"><h1>Search</h1></section>`;
}
