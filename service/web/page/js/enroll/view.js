// Enroll: not drawn yet.
import { html } from "../ui.js";

export function EnrollView() {
  return html`<section class="view"><h1>Enroll</h1><p class="soft">Nothing here yet.</p></section>`;
}
