// The files of a drop or a choice, folders and what is in them too.

const IMAGE = /\.(bmp|jpe?g|png|tiff?|webp)$/i;
// Made by network storage, operating systems and archives, as `cmt enroll` leaves them out.
const OTHER_PROGRAMS = new Set([
  "#recycle", "#snapshot", "$recycle.bin", "@__thumb", "@eadir", "@recently-snapshot", "@recycle", "@tmp",
  "__macosx", "lost+found", "recycler", "system volume information",
]);
const isOthers = (name) => name.startsWith(".") || OTHER_PROGRAMS.has(name.toLowerCase());

/** Of a list of files → {files: [{file, path, folder}], passed: how many are no pictures}.
 *
 * path: below the folder that was chosen; folder: that folder's name, "" where there was none.
 */
export function sorted(files) {
  const found = [];
  let passed = 0;
  for (const { file, path } of files) {
    const steps = path.split("/");
    // What somebody picked by itself is sent whatever it is called.
    if (steps.length > 1 && (steps.some(isOthers) || !IMAGE.test(file.name))) passed += 1;
    else found.push({ file, path: steps.slice(1).join("/") || path, folder: steps.length > 1 ? steps[0] : "" });
  }
  const order = new Intl.Collator("en", { numeric: true });
  found.sort((one, other) => order.compare(`${one.folder}/${one.path}`, `${other.folder}/${other.path}`));
  return { files: found, passed };
}

/** The files of <input type="file">, of a folder too. */
export const chosen = (list) => [...list].map((file) => ({ file, path: file.webkitRelativePath || file.name }));

/** The files of a drop, with those of its folders. Entries have to be taken before anything is awaited. */
export async function dropped(transfer) {
  const entries = [...transfer.items].filter((item) => item.kind === "file")
    .map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile()).filter(Boolean);
  const found = [];
  for (const entry of entries) {
    if (entry instanceof File) found.push({ file: entry, path: entry.name });
    else await walk(entry, found);
  }
  return found;
}

async function walk(entry, found) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => { entry.file(resolve, reject); });
    found.push({ file, path: entry.fullPath.replace(/^\//, "") });
    return;
  }
  if (isOthers(entry.name)) return;
  const reader = entry.createReader();
  for (;;) { // a reader gives its entries by the hundred
    const some = await new Promise((resolve, reject) => { reader.readEntries(resolve, reject); });
    if (!some.length) return;
    for (const one of some) await walk(one, found);
  }
}
