// One result: its crop, and what is known of it.
import { Icon } from "../components/icons.js";
import { Picture, whenNear } from "../components/picture.js";
import { MODALITIES, percent, personName, time } from "../format.js";
import { href } from "../router.js";
import { html, useEffect, useRef, useState } from "../ui.js";
import { Bands } from "./bands.js";
import { closeness, moveInWords, moves } from "./words.js";

const EAGER = 24; // results whose pictures are fetched at once, wherever they stand

/** What a picture of a result is called. */
export const altOf = ({ rank, item }) =>
  `Result ${rank}: ${personName(item)}, camera ${item.camera_id ?? "unknown"}, ${MODALITIES[item.modality]}`;

/** The shape of a crop, by which it lies in its frame so that what is drawn over it fits. */
export const shape = ({ width, height }) => ({ "--aspect": width / height });

/** A result as a list item. lazy: no more than its name until it comes near the screen. */
export function Card({ lazy, ...rest }) {
  const { result } = rest;
  const place = useRef(null);
  const [near, setNear] = useState(!lazy || result.rank <= EAGER);
  useEffect(() => {
    if (near) return undefined;
    const stop = whenNear(place.current, () => { stop(); setNear(true); });
    return stop;
  }, [near]);
  return html`
    <li ref=${place} class=${`result ${near ? "" : "result-far"}`} data-testid="result" data-item=${result.item.id}>
      ${near ? html`<${Near} ...${rest} />` : html`<img src="data:," alt=${altOf(result)} />`}
    </li>`;
}

function Near({ result, answer, agreement, bands, onCompare, onLike }) {
  const { item, rank, probability } = result;
  const moved = moves(result, answer.body, answer.asked);
  return html`
      <button type="button" class="result-picture" aria-label=${`Compare with the query: ${altOf(result)}`} onClick=${() => onCompare(rank)}>
        <span class="fit" style=${shape(item)}>
          <${Picture} id=${item.id} height=${256} alt=${altOf(result)} eager=${rank <= EAGER} />
          ${bands && agreement && html`<${Bands} values=${agreement} calibrated=${result.agreement !== null} />`}
        </span>
        <span class="rank" aria-hidden="true">${rank}</span>
      </button>
      <div class="result-facts">
        <p class="result-probability">${probability === null ? closeness(result) : percent(probability)}</p>
        <p class="result-person text" title=${item.person_id}>${item.person_id === null
          ? html`<span class="soft">no label</span>` : html`Person <bdi>${item.person_id}</bdi>`}</p>
        <p class="soft text" title=${item.camera_id}><bdi>${item.camera_id ?? "no camera"}</bdi> · ${MODALITIES[item.modality]}</p>
        <p class="soft">${item.captured_at ? html`<time datetime=${item.captured_at}>${time(item.captured_at)}</time>` : "no time"}</p>
        ${moved.length > 0 && html`<p class="moves">${moved.map((one) => html`
          <span key=${one.what} class=${`move ${one.by > 0 ? "up" : "down"}`} title=${`${one.what}: ${moveInWords(one)}`}>
            <span aria-hidden="true">${one.by > 0 ? "▲" : "▼"}${Math.abs(one.by)} ${one.what}</span>
            <span class="visually-hidden">${moveInWords(one)}.</span></span>`)}</p>`}
      </div>
      <div class="result-actions">
        <button type="button" class="button small quiet" title="Compare" aria-label=${`Compare result ${rank}`} onClick=${() => onCompare(rank)}><${Icon} name="compare" /></button>
        <button type="button" class="button small quiet" title="Use as query" aria-label=${`Use result ${rank} as query`} onClick=${() => onLike(item)}><${Icon} name="search" /></button>
        <a class="button small quiet" title="Open the item" aria-label=${`Open result ${rank}`} href=${href("item", item.id)}><${Icon} name="open" /></a>
      </div>`;
}
