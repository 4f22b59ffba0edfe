// A modal dialog on the browser's own <dialog>: it traps the focus, closes on Escape and gives the
// focus back.
import { html, useEffect, useId, useRef } from "../ui.js";

/** title, children, footer; onClose: called however it is closed. wide: for pictures. */
export function Dialog({ title, onClose, wide = false, footer = null, children }) {
  const dialog = useRef(null);
  const heading = useId();
  useEffect(() => {
    const element = dialog.current;
    const before = document.activeElement;
    element.showModal();
    return () => {
      element.close();
      if (before?.isConnected) before.focus();
    };
  }, []);
  const outside = (event) => { if (event.target === dialog.current) onClose(); };
  return html`
    <dialog ref=${dialog} class=${`dialog ${wide ? "dialog-wide" : ""}`} aria-labelledby=${heading}
      onCancel=${(event) => { event.preventDefault(); onClose(); }} onClick=${outside}>
      <div class="dialog-box">
        <header class="dialog-head">
          <h2 id=${heading}>${title}</h2>
          <button type="button" class="button quiet" aria-label="Close" onClick=${onClose}>✕</button>
        </header>
        <div class="dialog-body">${children}</div>
        ${footer && html`<footer class="dialog-foot">${footer}</footer>`}
      </div>
    </dialog>`;
}

/** Ask before something that cannot be taken back. action: the verb on the button. */
export function Confirm({ title, action, onConfirm, onClose, children }) {
  return html`
    <${Dialog} title=${title} onClose=${onClose} footer=${html`
      <button type="button" class="button" onClick=${onClose}>Cancel</button>
      <button type="button" class="button danger" onClick=${onConfirm}>${action}</button>`}>
      ${children}
    <//>`;
}
