// An answer as CSV for spreadsheets: RFC 4180, UTF-8 with a byte order mark.

const COLUMNS = [
  "rank", "person_id", "probability", "similarity", "distance", "camera_id", "captured_at", "modality",
  "item_id", "match", "probability_enrolled", "prior", "searched", "people", "model",
];

/** A cell. What a spreadsheet would take for a formula gets a quote before it. */
export function cell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[\s\u0000-\u001f]*[=+\-@＝＋－＠]|^[\t\r\n]/u.test(value) ? `'${value}` : value;
  return /[",\r\n;]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** prior: as it was assumed. */
export function csvOf(body, prior) {
  const whole = [body.match, body.probability_enrolled, prior, body.searched, body.people, body.model];
  const rows = body.results.map(({ rank, item, probability, similarity, distance }) => [
    rank, item.person_id, probability, similarity, distance, item.camera_id, item.captured_at,
    item.modality, item.id, ...whole,
  ]);
  return `\ufeff${[COLUMNS, ...rows].map((row) => row.map(cell).join(",")).join("\r\n")}\r\n`;
}
