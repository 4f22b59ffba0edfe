// What the path of a file says of its picture, by patterns such as {camera}/{person}/*.jpg: those of
// `cmt enroll --pattern`, but for formats of times.

const FIELDS = {
  person: "person_id", person_id: "person_id", camera: "camera_id", camera_id: "camera_id",
  time: "captured_at", captured_at: "captured_at", modality: "modality", polarity: "polarity",
};
const MODALITIES = { visible: "rgb", infrared: "ir", thermal: "ir", rgb: "rgb", ir: "ir" };
const TOKEN = /\{([^{}]*)\}|(?<![^/])\*\*(?:\/|$)|\*|\?|[^{}*?]+|[{}]/g;
const ISO = new RegExp("^(\\d{4})[-.]?(\\d\\d)[-.]?(\\d\\d)[Tt _-]?(\\d\\d)[:.-]?(\\d\\d)(?:[:.-]?(\\d\\d)(?:[.,](\\d{1,6}))?)?"
  + "\\s?([Zz]|[+-]\\d\\d:?\\d\\d)?$");

/** A pattern → a function of a path that gives its labels, or null where it does not match.
 *
 * Throws an Error whose message says what to write instead.
 */
export function readPattern(text) {
  const known = new Set();
  let regex = "", open = false;
  for (const [token, field] of text.trim().normalize("NFC").replace(/^(\.\/)+/, "").matchAll(TOKEN)) {
    if (token === "{" || token === "}") throw new Error(`A single ${token} stands in the pattern; fields are written as in {camera}/{person}/*.jpg.`);
    if (field !== undefined) {
      const name = FIELDS[field.trim()];
      if (!name) throw new Error(`{${field}} is no field; there are {person}, {camera}, {time}, {modality} and {polarity}.`);
      if (open && !known.has(name)) throw new Error(`Nothing stands before ${token} that says where it begins; write a slash or another text.`);
      regex += known.has(name) ? `\\k<${name}>` : `(?<${name}>[^/]+?)`;
      open = !known.has(name);
      known.add(name);
    } else if (token.startsWith("**")) {
      regex += token.endsWith("/") ? "(?:[^/]+/)*" : "(?:[^/]+/)*[^/]+";
      open = false;
    } else if (token === "*") {
      if (open) throw new Error("Nothing stands between a field and *; write a slash or another text.");
      regex += "[^/]*";
      open = true;
    } else {
      regex += token === "?" ? "[^/]" : token.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
      open = false;
    }
  }
  if (text.trim().endsWith("}")) regex += "\\.[^/.]+";
  if (!known.size) throw new Error("The pattern names no field; write for example {camera}/{person}/*.jpg.");
  const whole = new RegExp(`^${regex}$`, "iu");
  return (path) => {
    const found = whole.exec(path.normalize("NFC"));
    return found && labelsOf({ ...found.groups });
  };
}

function labelsOf(texts) {
  if (texts.modality) {
    const modality = texts.modality.toLowerCase();
    texts.modality = MODALITIES[modality] ?? modality;
  }
  if (texts.polarity) texts.polarity = texts.polarity.toLowerCase();
  if (texts.captured_at) texts.captured_at = timeOf(texts.captured_at);
  return texts;
}

/** A time as file names write it, in the reader's zone where it says none; as it stands if it is none. */
function timeOf(text) {
  const found = ISO.exec(text);
  if (!found) return text; // the service says what is wrong with it
  const [, year, month, day, hour, minute, second = "00", fraction = "0", offset = ""] = found;
  const zone = /\d{4}$/.test(offset) ? `${offset.slice(0, 3)}:${offset.slice(-2)}` : offset.toUpperCase();
  const moment = new Date(`${year}-${month}-${day}T${hour}:${minute}:${second}.${fraction.padEnd(3, "0").slice(0, 3)}${zone}`);
  return Number.isNaN(moment.getTime()) ? text : moment.toISOString();
}
