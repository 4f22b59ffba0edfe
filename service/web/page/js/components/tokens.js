// A field for several labels: each becomes a chip on Enter or when the field is left. Labels may
// hold any character, a comma too, so nothing else divides them.
import { html, useId, useRef } from "../ui.js";

/** label, values, onChange(values), suggestions: an iterable of labels. */
export function Tokens({ label, values, onChange, suggestions = [], placeholder = "" }) {
  const input = useRef(null);
  const list = useId();
  const add = () => {
    const text = input.current.value.trim();
    input.current.value = "";
    if (text && !values.includes(text)) onChange([...values, text]);
  };
  const remove = (value) => {
    onChange(values.filter((one) => one !== value));
    input.current.focus();
  };
  const open = [...suggestions].filter((one) => !values.includes(one)).sort();
  return html`
    <div class="field">
      <label class="field"><span>${label}</span>
        <input ref=${input} list=${list} placeholder=${placeholder} autocomplete="off" maxlength="128"
          onChange=${add} onKeyDown=${(event) => { if (event.key === "Enter") { event.preventDefault(); add(); } }} />
      </label>
      <datalist id=${list}>${open.map((one) => html`<option key=${one} value=${one} />`)}</datalist>
      ${values.length > 0 && html`<ul class="chips" aria-label=${`${label}: chosen`}>${values.map((value) => html`
        <li class="chip" key=${value}><span class="text">${value}</span>
          <button type="button" aria-label=${`Remove ${value}`} onClick=${() => remove(value)}>✕</button></li>`)}</ul>`}
    </div>`;
}
