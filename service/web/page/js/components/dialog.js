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
  // A drag from a field to outside of the dialog, or back, is no wish to close it.
  const ends = useRef([]);
  const outside = (event) => {
    const all = [...ends.current, event.target];
    ends.current = [];
    if (all.length === 3 && all.every((target) => target === dialog.current)) onClose();
  };
  return html`
    <dialog ref=${dialog} class=${`dialog ${wide ? "dialog-wide" : ""}`} aria-labelledby=${heading}
      onCancel=${(event) => { event.preventDefault(); onClose(); }}
      onPointerDown=${(event) => { ends.current = [event.target]; }}
      onPointerUp=${(event) => { ends.current.push(event.target); }} onClick=${outside}>
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
