// Small drawings for buttons; each button has its words beside it or in its label.
import { html } from "../ui.js";

const PATHS = {
  compare: "M3 4h7v16H3zM14 4h7v16h-7z",
  search: "M10.5 4a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM15.5 15.5 21 21",
  open: "M14 4h6v6M20 4l-9 9M18 14v6H4V6h6",
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
  upload: "M12 16V4M7 9l5-5 5 5M4 16v4h16v-4",
  box: "M4 8V4h4M16 4h4v4M20 16v4h-4M8 20H4v-4",
  plus: "M12 5v14M5 12h14",
};

export function Icon({ name, size = 16 }) {
  return html`
    <svg class="icon" width=${size} height=${size} viewBox="0 0 24 24" aria-hidden="true" fill="none"
      stroke="currentColor" stroke-width="2" stroke-linecap="round" stroke-linejoin="round">
      <path d=${PATHS[name]} />
    </svg>`;
}
