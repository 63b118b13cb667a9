// Lists models, shows one, sends it requests in the binary tensor form, which carries every
// datatype exactly. What a server, a model or a file says becomes text by textContent, never HTML.

const POLL_MS = 5000;
const MOST = { rows: 200, columns: 64, bars: 100, elements: 10000, prefilled: 64 };
const NONE = "–";

const byId = (id) => document.getElementById(id);
const copy = (id) => byId(id).content.firstElementChild.cloneNode(true);
const product = (shape) => shape.reduce((all, size) => all * size, 1);
const one = (shape) => shape.map((size) => (size < 0 ? 1 : size));

function element(tag, text = "", attributes = {}) {
  const node = document.createElement(tag);
  node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function say(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

// --- asking the server --------------------------------------------------------------------------

async function ask(path, options = {}) {
  let reply;
  try {
    reply = await fetch(path, { cache: "no-store", ...options });
  } catch {
    throw new Error("The server does not answer.");
  }
  if (reply.ok) return reply;
  const text = await reply.text();
  let told = reply.statusText;
  try {
    told = JSON.parse(text).error ?? told;
  } catch {
    // no JSON: a proxy's own words, or none
  }
  throw new Error(`${reply.status}: ${told}`);
}

const askJson = async (path, options) => (await ask(path, options)).json();

// --- the table of models ------------------------------------------------------------------------

const rows = new Map(); // by name and version: the row, and what was last counted

const mean = (sum, count, unit = 1) => (count ? (sum / count / unit).toFixed(2) : NONE);

function counted(stats, last, now) {
  const of = stats?.inference_stats;
  if (!of) {
    return { requests: NONE, failed: NONE, rate: NONE, batch: NONE, queue: NONE, compute: NONE };
  }
  const count = of.success.count;
  const compute = of.compute_input.ns + of.compute_infer.ns + of.compute_output.ns;
  const since = last && count >= last.count ? (count - last.count) / ((now - last.at) / 1000) : null;
  return {
    requests: String(count),
    failed: String(of.fail.count),
    rate: since === null ? NONE : since.toFixed(1),
    batch: mean(stats.inference_count, stats.execution_count),
    queue: mean(of.queue.ns, of.queue.count, 1e6),
    compute: mean(compute, of.compute_infer.count, 1e6),
  };
}

function addRow(name, version) {
  const node = copy("row");
  const button = node.querySelector(".name");
  button.textContent = name;
  const target = `#/${encodeURIComponent(name)}/${version}`;
  button.addEventListener("click", () => {
    if (location.hash === target) show();
    else location.hash = target;
  });
  return { node, last: null };
}

function drawRow({ node, last }, { version = NONE, state = "not loaded", reason = "" }, stats, now) {
  const texts = { version, state, reason, ...counted(stats, last, now) };
  for (const [name, text] of Object.entries(texts)) {
    const cell = node.querySelector(`.${name}`);
    if (cell.textContent !== text) cell.textContent = text;
  }
  const mark = node.querySelector(".state").classList;
  mark.toggle("good", state === "READY");
  mark.toggle("bad", state === "UNAVAILABLE" && reason !== "unloaded");
}

// Rows stay where they are, so that whoever stands on one does not lose it.
function drawRows(index, statistics) {
  const now = performance.now();
  const key = ({ name, version = "" }) => JSON.stringify([name, version]);
  const stats = new Map(statistics.map((each) => [key(each), each]));
  const present = new Set(index.map(key));
  for (const [gone, { node }] of rows) {
    if (!present.has(gone)) {
      node.remove();
      rows.delete(gone);
    }
  }
  let next = byId("rows").firstElementChild;
  for (const entry of index) {
    const id = key(entry);
    const row = rows.get(id) ?? addRow(entry.name, entry.version ?? "");
    rows.set(id, row);
    drawRow(row, entry, stats.get(id), now);
    const count = stats.get(id)?.inference_stats?.success.count;
    row.last = count === undefined ? null : { count, at: now };
    if (row.node === next) next = next.nextElementSibling;
    else byId("rows").insertBefore(row.node, next);
  }
}

async function refresh() {
  const [ready, index, statistics] = await Promise.allSettled([
    fetch("v2/health/ready", { cache: "no-store" }),
    askJson("v2/repository/index", { method: "POST" }),
    askJson("v2/models/stats"),
  ]);
  say("health", ready.value?.ok ? "The server is ready." : "The server is not ready.");
  const troubles = [index, statistics].filter((each) => each.status === "rejected");
  say("trouble", [...new Set(troubles.map((each) => each.reason.message))].join(" "));
  if (index.status === "fulfilled") drawRows(index.value, statistics.value?.model_stats ?? []);
}

let timer = 0;
let refreshing = false;

const isWanted = () => !document.hidden && byId("live").checked;

async function tick() {
  clearTimeout(timer);
  if (refreshing) return;
  refreshing = true;
  try {
    await refresh();
  } finally {
    refreshing = false;
  }
  if (isWanted()) timer = setTimeout(tick, POLL_MS);
}

function goOn() {
  if (isWanted()) tick();
  else clearTimeout(timer);
}

// --- one model ----------------------------------------------------------------------------------

let current = null; // the model that is shown
let turn = 0; // what was asked for one that is no longer shown is dropped
let running = false;

function target() {
  const match = /^#\/([^/]+)\/(\d*)$/.exec(location.hash);
  try {
    return match && { name: decodeURIComponent(match[1]), version: match[2] };
  } catch {
    return null; // no such thing was linked from here
  }
}

async function show() {
  const mine = ++turn;
  const wanted = target();
  current = null;
  byId("model").hidden = !wanted;
  document.title = wanted ? `${wanted.name} – Manta` : "Manta";
  if (!wanted) return;
  const { name, version } = wanted;
  say("chosen", version ? `${name}, version ${version}` : name);
  for (const id of ["about", "error", "progress", "config"]) say(id, "");
  for (const id of ["inputs", "outputs"]) byId(id).replaceChildren();
  for (const id of ["form", "configuration"]) byId(id).hidden = true;
  byId("chosen").focus();
  const base = `v2/models/${encodeURIComponent(name)}${version ? `/versions/${version}` : ""}`;
  try {
    const [metadata, config] = await Promise.all([askJson(base), askJson(`${base}/config`)]);
    if (mine === turn) fill(base, metadata, config);
  } catch (error) {
    if (mine === turn) say("error", error.message);
  }
}

function fill(base, metadata, config) {
  const batched = config.max_batch_size > 0;
  const optional = new Set(config.input.filter((each) => each.optional).map((each) => each.name));
  const fields = metadata.inputs.map((entry, index) =>
    field(entry, optional.has(entry.name), batched, index),
  );
  byId("inputs").replaceChildren(...fields.map((each) => each.node));
  current = { base, batched, fields, outputs: metadata.outputs.map((each) => each.name) };
  const batches = batched ? `batches of up to ${config.max_batch_size} rows` : "no batches";
  say("about", `Platform ${metadata.platform}, ${batches}.`);
  say("config", JSON.stringify(config, null, 2));
  for (const id of ["form", "configuration"]) byId(id).hidden = false;
}

function field(entry, optional, batched, index) {
  const node = copy("input");
  const [data, shape] = [node.querySelector(".data"), node.querySelector(".shape")];
  const [file, scale] = [node.querySelector(".file input"), node.querySelector(".scale select")];
  const strings = entry.datatype === "BYTES";
  const picture = strings ? null : layout(batched ? entry.shape.slice(1) : entry.shape);
  const title = `${entry.name} ${entry.datatype} [${entry.shape.join(", ")}]`;
  node.querySelector("legend").textContent = title;
  const hint = node.querySelector(".hint");
  hint.textContent = [
    strings ? "A string a line, or a JSON array of strings." : "Values as a JSON array, flat or nested.",
    optional ? "Optional: left out while empty." : `Empty is ${strings ? "empty strings" : "zeros"}.`,
    picture ? "Or an image, which is scaled to the shape." : "",
    strings ? "Or a file, as one string." : "",
  ].join(" ");
  hint.id = `hint-${index}`;
  data.setAttribute("aria-describedby", hint.id);
  shape.placeholder = "by the data";
  node.querySelector(".file").hidden = !picture && !strings;
  node.querySelector(".scale").hidden = !picture;
  if (picture) file.accept = "image/*";
  scale.value = entry.datatype === "UINT8" ? "byte" : "one";
  data.addEventListener("input", () => (file.value = ""));
  const count = product(one(entry.shape));
  if (!optional && !strings && count <= MOST.prefilled) {
    data.value = `[${Array(count).fill(entry.datatype === "BOOL" ? "false" : "0").join(", ")}]`;
  }
  return { node, entry, optional, data, shape, file, scale, picture };
}

// --- a request ----------------------------------------------------------------------------------

function shapeOf(text) {
  let shape = null;
  try {
    shape = JSON.parse(`[${text.trim().replace(/^\[|\]$/g, "")}]`);
  } catch {
    // told below
  }
  if (!shape?.every((size) => Number.isInteger(size) && size >= 0)) {
    throw new Error(`${text} is no shape, such as [1, 3]`);
  }
  return shape;
}

// A shape of the metadata's pattern for `count` values that were given as `dims`.
function fit(pattern, dims, count) {
  const matches = (shape) =>
    shape.length === pattern.length &&
    product(shape) === count &&
    pattern.every((size, index) => size < 0 || size === shape[index]);
  for (const shape of [dims, [1, ...dims]]) if (matches(shape)) return shape;
  const shape = one(pattern);
  const open = pattern.lastIndexOf(-1);
  if (open >= 0) shape[open] = Math.floor(count / product(shape));
  return shape;
}

async function given({ entry, data, file, scale, picture, optional }, shape) {
  const kind = KINDS[entry.datatype];
  const [chosen] = file.files;
  if (chosen && picture) {
    const [values, dims] = await pixels(chosen, picture, scale.value);
    return [values.map(kind.from), dims];
  }
  if (chosen) return [[new Uint8Array(await chosen.arrayBuffer())], [1]];
  if (entry.datatype === "BYTES" ? data.value : data.value.trim()) return kind.parse(data.value);
  if (optional && !shape) return null;
  const dims = shape ?? one(entry.shape);
  return [Array(product(dims)).fill(kind.from(0)), dims];
}

// A tensor as it goes over the wire; null for one that is left out.
async function tensor(of) {
  const { name, datatype, shape: pattern } = of.entry;
  try {
    const asked = of.shape.value.trim() ? shapeOf(of.shape.value) : null;
    const found = await given(of, asked);
    if (!found) return null;
    const [values, dims] = found;
    const shape = asked ?? fit(pattern, dims, values.length);
    if (product(shape) !== values.length) {
      throw new Error(`${values.length} values do not fill the shape [${shape.join(", ")}]`);
    }
    const bytes = KINDS[datatype].encode(values);
    const parameters = { binary_data_size: bytes.length };
    return { bytes, head: { name, datatype, shape, parameters } };
  } catch (error) {
    throw new Error(`${name}: ${error.message}`);
  }
}

async function infer({ base, batched, fields, outputs }) {
  const tensors = (await Promise.all(fields.map(tensor))).filter(Boolean);
  const asked = outputs.map((name) => ({ name, parameters: { binary_data: true } }));
  const request = { inputs: tensors.map((each) => each.head), outputs: asked };
  const head = new TextEncoder().encode(JSON.stringify(request));
  const begun = performance.now();
  const reply = await ask(`${base}/infer`, {
    method: "POST",
    headers: {
      "Content-Type": "application/octet-stream",
      "Inference-Header-Content-Length": String(head.length),
    },
    body: new Blob([head, ...tensors.map((each) => each.bytes)]),
  });
  const body = new Uint8Array(await reply.arrayBuffer());
  const took = performance.now() - begun;
  let at = Number(reply.headers.get("Inference-Header-Content-Length") ?? body.length);
  const answer = JSON.parse(new TextDecoder().decode(body.subarray(0, at)));
  const decoded = answer.outputs.map((output) => {
    const start = at;
    at += output.parameters?.binary_data_size ?? 0;
    const values = KINDS[output.datatype].decode(body.subarray(start, at));
    const { shape } = output;
    const strings = output.datatype === "BYTES";
    const picture = strings ? null : layout(batched ? shape.slice(1) : shape);
    return { ...output, values, picture };
  });
  return { took, outputs: decoded };
}

async function submit(event) {
  event.preventDefault();
  if (running || !current) return;
  const mine = turn;
  running = true;
  say("error", "");
  say("progress", "Running …");
  try {
    const { took, outputs } = await infer(current);
    if (mine !== turn) return;
    byId("outputs").replaceChildren(...outputs.map(outputNode));
    say("progress", `Answered in ${took.toFixed(1)} ms.`);
  } catch (error) {
    if (mine !== turn) return;
    byId("outputs").replaceChildren();
    say("progress", "");
    say("error", error.message);
  } finally {
    running = false;
  }
}

// --- the start ----------------------------------------------------------------------------------

byId("form").addEventListener("submit", submit);
byId("live").addEventListener("change", goOn);
document.addEventListener("visibilitychange", goOn);
window.addEventListener("hashchange", () => {
  if (location.hash !== "#models") show(); // that is the link past the head
});
askJson("v2").then(
  ({ name, version }) => say("server", `${name} ${version}`),
  () => {}, // the table tells what is wrong
);
tick();
show();
