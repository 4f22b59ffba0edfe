// Two crops side by side: the query and a result, or two results.
import { Dialog } from "../components/dialog.js";
import { Icon } from "../components/icons.js";
import { Picture } from "../components/picture.js";
import { MODALITIES, decimal, percent, personName, time } from "../format.js";
import { html, useState } from "../ui.js";
import { Bands } from "./bands.js";
import { altOf, shape } from "./card.js";

const QUERY = 0; // stands for the query, where a result stands by its rank

/** first: the rank of the result that is compared with the query. */
export function Compare({ answer, agreements, first, onClose, onLike }) {
  const { results } = answer.body;
  const [left, setLeft] = useState(QUERY);
  const [right, setRight] = useState(first);
  const [bands, setBands] = useState(true);
  const at = results.findIndex((one) => one.rank === right);
  const step = (by) => setRight(results[at + by].rank);
  const known = left === QUERY || right === QUERY;
  return html`
    <${Dialog} title="Compare" wide onClose=${onClose} footer=${html`
      <button type="button" class="button" disabled=${at <= 0} onClick=${() => step(-1)}><${Icon} name="left" /> Previous</button>
      <button type="button" class="button" disabled=${at < 0 || at >= results.length - 1} onClick=${() => step(1)}>Next <${Icon} name="right" /></button>
      <span class="grow"></span>
      ${right !== QUERY && html`<button type="button" class="button" onClick=${() => { onClose(); onLike(results[at].item); }}>
        <${Icon} name="search" /> Use the right one as query</button>`}`}>
      <div class="compare">
        <${Side} name="Left" value=${left} set=${setLeft} answer=${answer} agreements=${agreements} bands=${bands && known} />
        <${Side} name="Right" value=${right} set=${setRight} answer=${answer} agreements=${agreements} bands=${bands && known} />
      </div>
      <div class="row compare-foot">
        <label class="check"><input type="checkbox" role="switch" checked=${bands} disabled=${!known}
          onChange=${(event) => setBands(event.target.checked)} />Agreement of parts</label>
        <span class="soft">${known ? "Of the result with the query, from head to feet." : "Known only between the query and a result."}</span>
      </div>
    <//>`;
}

function Side({ name, value, set, answer, agreements, bands }) {
  const { results } = answer.body;
  const at = results.findIndex((one) => one.rank === value);
  const result = results[at];
  return html`
    <section class="side" aria-label=${name}>
      <label class="field"><span>${name}</span>
        <select value=${value} onChange=${(event) => set(Number(event.target.value))}>
          <option value=${QUERY}>The query</option>
          ${results.map((one) => html`<option key=${one.rank} value=${one.rank}>${one.rank}. ${personName(one.item)}</option>`)}
        </select></label>
      ${result ? html`
        <div class="side-picture"><span class="fit" style=${shape(result.item)}>
          <${Picture} id=${result.item.id} height=${512} alt=${altOf(result)} eager />
          ${bands && agreements[at] && html`<${Bands} values=${agreements[at]} calibrated=${result.agreement !== null} />`}
        </span></div>
        <${Facts} result=${result} />` : html`
        <div class="side-picture side-query">${answer.pictures.map((one) => html`
          <img key=${one.key} src=${answer.asked.part ?? one.url} alt=${`Query: ${one.file.name}`} />`)}</div>
        <dl class="facts"><dt>Query</dt><dd class="text">${answer.pictures.map((one) => one.file.name).join(", ")}</dd>
          <dt>Kind</dt><dd>${MODALITIES[answer.body.query.modality]}</dd></dl>`}
    </section>`;
}

function Facts({ result }) {
  const { item } = result;
  return html`
    <dl class="facts">
      <dt>Person</dt><dd class="text">${item.person_id ?? "no label"}</dd>
      <dt>Probability</dt><dd>${percent(result.probability)}</dd>
      <dt>Similarity</dt><dd>${decimal(result.similarity)}</dd>
      <dt>Distance</dt><dd>${decimal(result.distance)}</dd>
      <dt>Camera</dt><dd class="text">${item.camera_id ?? "–"}, ${MODALITIES[item.modality]}</dd>
      <dt>Captured</dt><dd>${time(item.captured_at)}</dd>
    </dl>`;
}
