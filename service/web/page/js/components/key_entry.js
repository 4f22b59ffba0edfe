// Asks for an API key where the service refuses without one. It stays in this tab.
import { apiKey, keyFault, keyWanted, useKey } from "../api.js";
import { html, useEffect, useId, useRef, useState } from "../ui.js";
import { Dialog } from "./dialog.js";

export function KeyEntry() {
  const input = useRef(null);
  const id = useId();
  const [fault, setFault] = useState(null);
  const problem = keyWanted.value;
  useEffect(() => setFault(null), [problem]);
  if (!problem) return null;
  const submit = (event) => {
    event.preventDefault();
    const text = input.current.value.trim();
    const wrong = text ? keyFault(text) : "Enter a key.";
    setFault(wrong);
    if (wrong) input.current.focus();
    else useKey(text);
  };
  return html`
    <${Dialog} title=${problem.code ? "This service needs a key" : "API key"} onClose=${() => { keyWanted.value = null; }}>
      <form class="stack" onSubmit=${submit}>
        <p>${problem.code === "scope_missing"
          ? "The key in use may not do that; enter one that may."
          : problem.code && apiKey.value ? "The service does not know the key in use (any more)."
            : problem.code ? "Enter the API key that you were given; whoever runs the service makes one."
              : "Enter the API key that you were given, if the service has keys."}</p>
        ${problem.detail && html`<p class="soft">The service says: ${problem.detail}.</p>`}
        <label class="field"><span>API key</span>
          <input ref=${input} type="password" name="key" autocomplete="off" spellcheck=${false} required autofocus
            aria-invalid=${fault ? "true" : null} aria-describedby=${fault ? id : null} />
          ${fault && html`<span id=${id} class="fault text" role="alert">${fault}</span>`}
        </label>
        <p class="soft">It is kept in this tab only, and forgotten when the tab is closed.</p>
        <div class="row end">
          ${apiKey.value && html`<button type="button" class="button" onClick=${() => useKey("")}>Forget the key</button>`}
          <button type="submit" class="button primary">Use this key</button>
        </div>
      </form>
    <//>`;
}
