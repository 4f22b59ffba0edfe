// Which items of the gallery are searched.
import { TimeField } from "../components/time_field.js";
import { Tokens } from "../components/tokens.js";
import { cameras, persons } from "../state.js";
import { html, useState } from "../ui.js";
import { change, cleared, clearFilters, faults, filterCount, noteFault, options } from "./state.js";

export function Filters() {
  const chosen = options.value;
  const count = filterCount();
  const wrong = Object.keys(faults.value).some((label) => label.startsWith("Captured"));
  const [open] = useState(count > 0); // later it is as the reader folds it
  return html`
    <details class="card fold" open=${open}>
      <summary>Filters <span class="soft">${count ? `${count} set` : "all of the gallery is searched"}</span></summary>
      <div class="stack fold-body">
        <${Tokens} label="Cameras" values=${chosen.cameraIds} suggestions=${cameras.value} placeholder="any"
          onChange=${(values) => change({ cameraIds: values })} />
        <${Tokens} label="Without cameras" values=${chosen.excludeCameraIds} suggestions=${cameras.value} placeholder="none"
          onChange=${(values) => change({ excludeCameraIds: values })} />
        <${Tokens} label="People" values=${chosen.personIds} suggestions=${persons.value} placeholder="any"
          onChange=${(values) => change({ personIds: values })} />
        <label class="field"><span>Pictures that are</span>
          <select name="gallery_modality" value=${chosen.galleryModality}
            onChange=${(event) => change({ galleryModality: event.target.value })}>
            <option value="">visible or infrared</option>
            <option value="rgb">visible</option>
            <option value="ir">infrared</option>
          </select></label>
        <div class="two times">
          <${TimeField} name="captured_from" label="Captured from" value=${chosen.capturedFrom} turn=${cleared.value}
            onTime=${(text) => change({ capturedFrom: text })} onFault=${(sentence) => noteFault("Captured from", sentence)} />
          <${TimeField} name="captured_to" label="Captured until" value=${chosen.capturedTo} turn=${cleared.value}
            onTime=${(text) => change({ capturedTo: text })} onFault=${(sentence) => noteFault("Captured until", sentence)} />
        </div>
        <p class="soft">Times are this computer's (${Intl.DateTimeFormat().resolvedOptions().timeZone}). Items without
          a time are left out where one is set.</p>
        ${(count > 0 || wrong) && html`<div><button type="button" class="button small" onClick=${clearFilters}>Clear the filters</button></div>`}
      </div>
    </details>`;
}
