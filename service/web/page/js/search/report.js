// An answer as one HTML file that needs nothing else: pictures inside, no script, and a policy that
// forbids any.
import { MODALITIES, percent, personName, zonedTime } from "../format.js";
import { patiently } from "../pictures.js";
import { closeness, extent, headline, meaning } from "./words.js";

const AT_ONCE = 6;

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
/** Text as HTML: whatever others wrote stays text. */
export const escaped = (text) => String(text).replace(/[&<>"']/g, (mark) => ENTITIES[mark]);

const STYLE = `
:root{color-scheme:light dark;font:15px/1.45 system-ui,sans-serif}
body{margin:2rem auto;padding:0 1rem;max-width:80rem;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:0}p{margin:.3rem 0}.soft{opacity:.75;font-size:.85rem}
.row{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
figure{margin:0;width:9rem}img{width:9rem;height:18rem;object-fit:contain;background:#8882;border-radius:6px}
figcaption{font-size:.85rem}b{font-size:1.1rem}
@media print{figure{break-inside:avoid}}`;

const dataUri = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});

/** A picture as a browser shows it, no higher than 512: JPEG as a data URI, or null. */
async function shown(url) {
  const image = new Image();
  image.src = url;
  try { await image.decode(); } catch { return null; }
  const scale = Math.min(1, 512 / image.naturalHeight);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * image.naturalWidth));
  canvas.height = Math.max(1, Math.round(scale * image.naturalHeight));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.9);
}

async function thumbnails(items, signal, onProgress) {
  const found = new Array(items.length).fill(null);
  let next = 0, done = 0;
  const work = async () => {
    while (next < items.length) {
      const place = next++;
      try {
        found[place] = await dataUri(await patiently(items[place].id, 256, { signal }));
      } catch (error) {
        if (error.status !== 404) throw error; // deleted meanwhile: the report says so
      }
      onProgress((done += 1));
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  return found;
}

const figure = (uri, lines) => `<figure>${uri
  ? `<img src="${uri}" alt="${escaped(lines[0])}">` : "<p class=soft>picture not available</p>"}<figcaption>${
  lines.filter(Boolean).map((line, place) => (place ? escaped(line) : `<b>${escaped(line)}</b>`)).join("<br>")
}</figcaption></figure>`;

/** The report as text. filters: what was searched, in words. */
export async function reportOf({ body, asked, pictures }, { prior, filters, signal, onProgress }) {
  const words = headline(body);
  const queries = await Promise.all(pictures.map((one) => shown(asked.part ?? one.url)));
  const crops = await thumbnails(body.results.map((result) => result.item), signal, onProgress);
  const facts = [
    words.figure, words.whole, ...words.notes, extent(body),
    words.kind !== "unknown" && body.searched ? meaning(body, prior) : "",
    `Modulation ${asked.modulation ? "on" : "off"}, re-ranking ${body.rerank === "none" ? "off" : "on"}${
      asked.grouped ? ", grouped by person" : ""}.`,
    filters, `Checkpoint ${body.model}. Written ${zonedTime(new Date().toISOString())}.`,
  ].filter(Boolean);
  const title = escaped(words.title);
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${title}</title><style>${STYLE}</style></head><body>
<h1>${title}</h1>
${facts.map((fact) => `<p>${escaped(fact)}</p>`).join("\n")}
<h2>Query, ${MODALITIES[body.query.modality]}</h2>
<div class="row">${pictures.map((one, place) => figure(queries[place], [one.file.name])).join("")}</div>
<h2>Results</h2>
<div class="row">
${body.results.map((result, place) => figure(crops[place], [
    `${result.rank}. ${personName(result.item)}`,
    result.probability === null ? closeness(result) : percent(result.probability),
    `${result.item.camera_id ?? "no camera"}, ${MODALITIES[result.item.modality]}`,
    result.item.captured_at ? zonedTime(result.item.captured_at) : "no time",
  ])).join("\n")}
</div></body></html>
`;
}
