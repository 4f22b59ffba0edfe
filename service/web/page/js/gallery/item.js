// One item: not drawn yet.
import { html } from "../ui.js";

export function ItemView({ id }) {
  return html`<section class="view"><h1>Item ${id}</h1><p class="soft">Nothing here yet.</p></section>`;
}
