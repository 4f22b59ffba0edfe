// Items as a wall of small pictures, each a link to its item.
import { Picture } from "../components/picture.js";
import { MODALITIES, personName, time } from "../format.js";
import { href } from "../router.js";
import { html } from "../ui.js";

export const THUMBNAIL = 256; // pixels: twice what is drawn, for sharp screens

/** What an item's picture shows, in words. */
export const described = (item) =>
  `${personName(item)}, ${item.camera_id === null ? "no camera" : `camera ${item.camera_id}`}, ${MODALITIES[item.modality]}`;

export function Cards({ items }) {
  return html`<ul class="cards">${items.map((item) => html`
    <li key=${item.id} data-testid="item" data-item=${item.id}>
      <a class="card item-card" href=${href("item", item.id)}>
        <${Picture} id=${item.id} height=${THUMBNAIL} alt=${described(item)} />
        <span class="item-words">
          <b class="text">${item.person_id ?? "unlabelled"}</b>
          <span class="text soft">${item.camera_id ?? "no camera"} · ${MODALITIES[item.modality]}</span>
          <span class="soft">${item.captured_at ? time(item.captured_at) : "no time"}</span>
        </span>
      </a>
    </li>`)}</ul>`;
}
