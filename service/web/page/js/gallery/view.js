// Gallery: not drawn yet.
import { html } from "../ui.js";

export function GalleryView() {
  return html`<section class="view"><h1>Gallery</h1><p class="soft">Nothing here yet.</p></section>`;
}
