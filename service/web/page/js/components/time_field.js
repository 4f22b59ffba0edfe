// A field for a moment in the reader's own time. A browser gives "" for a time that is typed only
// in part, which would be taken for none: here the field is marked and says what it lacks.
import { html, useEffect, useId, useLayoutEffect, useRef, useState } from "../ui.js";

const LAST = "9999-12-31T23:59:59"; // without it the year takes six digits, which no service reads

/** What is wrong with an <input type="datetime-local">, in a sentence, or null. */
export function timeFault(input) {
  if (input.validity.badInput) return "This time is not complete: fill in all of it, or clear it.";
  return input.validity.valid ? null : "This time cannot be; the year has four digits.";
}

/** value: local, as the input holds it, or "". onTime(value): another one, right and whole.
 *
 * onFault(sentence): what is wrong with what is typed, null once nothing is; the value stays as it
 * was meanwhile. turn: where it changes, the field shows its value again, whatever is typed.
 */
export function TimeField({ label, name, value, onTime = () => {}, onFault = () => {}, turn = 0 }) {
  const input = useRef(null);
  const known = useRef(null);
  const id = useId();
  const [fault, setFault] = useState(null);
  const tell = (sentence) => {
    if (sentence !== known.current) onFault(sentence);
    known.current = sentence;
  };
  // Not drawn as a prop: any other change would then undo what is being typed.
  useLayoutEffect(() => {
    if (known.current || input.current.value !== value) input.current.value = value;
    tell(null);
    setFault(null);
  }, [value, turn]);
  useEffect(() => () => tell(null), []);
  const check = (event) => {
    const { target } = event;
    const wrong = timeFault(target);
    tell(wrong);
    // Who is still typing need not read what is missing.
    if (event.type === "blur" || !wrong || fault) setFault(wrong);
    if (!wrong && target.value !== value) onTime(target.value);
  };
  return html`
    <label class="field"><span>${label}</span>
      <input ref=${input} type="datetime-local" name=${name} step="1" max=${LAST} aria-invalid=${fault ? "true" : null}
        aria-describedby=${fault ? id : null} onInput=${check} onKeyUp=${check} onBlur=${check} />
      ${fault && html`<span class="fault" id=${id} role="alert">${fault}</span>`}</label>`;
}
