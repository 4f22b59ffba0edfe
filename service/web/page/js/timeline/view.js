// Timeline: not drawn yet.
import { html } from "../ui.js";

export function TimelineView() {
  return html`<section class="view"><h1>Timeline</h1><p class="soft">Nothing here yet.</p></section>`;
}
