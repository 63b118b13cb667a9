// --- images -------------------------------------------------------------------------------------

// Where a shape without its batch looks like an image's: channels first, or last.
function layout(shape) {
  const [a, b, c] = shape.slice(-3);
  const large = (size) => size < 0 || size > 4;
  const few = (size) => [1, 3, 4].includes(size);
  if (shape.length < 3) return null;
  if (few(a) && large(b) && large(c)) return { channels: a, height: b, width: c, planar: true };
  if (large(a) && large(b) && few(c)) return { channels: c, height: a, width: b, planar: false };
  return null;
}

const MEAN = [0.485, 0.456, 0.406];
const DEVIATION = [0.229, 0.224, 0.225];
const SCALES = {
  one: (value) => value / 255,
  byte: (value) => value,
  imagenet: (value, c) => (c < 3 ? (value / 255 - MEAN[c]) / DEVIATION[c] : value / 255),
};

async function pixels(file, { channels, height, width, planar }, scale) {
  const image = await createImageBitmap(file);
  const canvas = document.createElement("canvas");
  canvas.width = width < 0 ? image.width : width;
  canvas.height = height < 0 ? image.height : height;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  const size = canvas.width * canvas.height;
  const values = new Array(channels * size);
  for (let at = 0; at < size; at++) {
    const [r, g, b] = data.subarray(4 * at, 4 * at + 3);
    for (let c = 0; c < channels; c++) {
      const value = channels === 1 ? 0.299 * r + 0.587 * g + 0.114 * b : data[4 * at + c];
      values[planar ? c * size + at : at * channels + c] = SCALES[scale](value, c);
    }
  }
  const plane = [canvas.height, canvas.width];
  return [values, planar ? [channels, ...plane] : [...plane, channels]];
}

function image({ values, datatype, name, picture }) {
  const { channels, height, width, planar } = picture;
  const size = height * width;
  const numbers = values.slice(0, channels * size).map(Number);
  let [low, high] = [0, 255];
  if (datatype !== "UINT8") {
    low = numbers.reduce((least, number) => Math.min(least, number), Infinity);
    high = numbers.reduce((most, number) => Math.max(most, number), -Infinity);
  }
  const shown = new ImageData(width, height);
  for (let at = 0; at < size; at++) {
    for (let c = 0; c < 4; c++) {
      const channel = channels === 1 ? 0 : c;
      const number = numbers[planar ? channel * size + at : at * channels + channel];
      const level = c === 3 && channels < 4 ? 255 : ((number - low) / (high - low || 1)) * 255;
      shown.data[4 * at + c] = level;
    }
  }
  const canvas = element("canvas", "", { role: "img", "aria-label": `${name} as an image` });
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(shown, 0, 0);
  const figure = element("figure");
  const range = `black is ${low}, white is ${high}`;
  figure.append(canvas, element("figcaption", `${width} × ${height}; ${range}`));
  return figure;
}

// --- the other views of an output ---------------------------------------------------------------

// The shortest text that is the value again.
function written(value, datatype) {
  if (typeof value !== "number" || !Number.isFinite(value)) return String(value);
  if (datatype === "FP16") return String(Number(value.toPrecision(5)));
  if (datatype === "BF16") return String(Number(value.toPrecision(4)));
  if (datatype !== "FP32") return String(value);
  let text = String(value);
  for (let digits = 9; digits >= 6; digits--) {
    const shorter = Number(value.toPrecision(digits));
    if (Math.fround(shorter) !== value) break;
    text = String(shorter);
  }
  return text;
}

const columnsOf = (shape) => shape.at(-1) ?? 1;

function place(row, shape) {
  const index = [];
  let rest = row;
  for (const size of shape.slice(0, -1).reverse()) {
    index.unshift(rest % size);
    rest = Math.floor(rest / size);
  }
  return index.join(", ") || "0";
}

function table({ values, shape, datatype }) {
  const [columns, node] = [columnsOf(shape), element("table")];
  const rows = values.length / columns;
  const [width, height] = [Math.min(columns, MOST.columns), Math.min(rows, MOST.rows)];
  if (width < columns || height < rows) {
    node.append(element("caption", `the first ${height} of ${rows} rows, ${width} of ${columns} columns`));
  }
  const head = node.createTHead().insertRow();
  head.append(element("td"));
  for (let c = 0; c < width; c++) head.append(element("th", String(c), { scope: "col" }));
  const body = node.createTBody();
  for (let r = 0; r < height; r++) {
    const row = body.insertRow();
    row.append(element("th", place(r, shape), { scope: "row" }));
    for (let c = 0; c < width; c++) {
      row.append(element("td", written(values[r * columns + c], datatype), { class: "number" }));
    }
  }
  return node;
}

function text({ values, shape, datatype }) {
  const shown = values.slice(0, MOST.elements).map((value) => written(value, datatype));
  const columns = datatype === "BYTES" ? 1 : columnsOf(shape);
  const lines = [];
  for (let at = 0; at < shown.length; at += columns) {
    lines.push(shown.slice(at, at + columns).join(", "));
  }
  if (shown.length < values.length) lines.push(`… and ${values.length - shown.length} more`);
  return element("pre", lines.join("\n") || "(no elements)", { tabindex: "0" });
}

function bars({ values, shape, datatype }) {
  const columns = columnsOf(shape);
  const shown = values.slice(0, Math.min(columns, MOST.bars));
  const numbers = shown.map(Number).map((number) => (Number.isFinite(number) ? number : 0));
  const low = Math.min(0, ...numbers);
  const span = Math.max(0, ...numbers) - low || 1;
  const node = element("table");
  if (shown.length < values.length) {
    node.append(element("caption", `the first ${shown.length} of ${values.length} values`));
  }
  numbers.forEach((number, index) => {
    const row = node.insertRow();
    const track = element("div", "", { class: "track", "aria-hidden": "true" });
    const bar = element("div", "", { class: "bar" });
    bar.style.left = `${((Math.min(number, 0) - low) / span) * 100}%`;
    bar.style.width = `${(Math.abs(number) / span) * 100}%`;
    track.append(bar);
    const cell = element("td");
    cell.append(track);
    const value = element("td", written(shown[index], datatype), { class: "number" });
    row.append(element("th", String(index), { scope: "row" }), cell, value);
  });
  return node;
}

const VIEWS = { table, "bar chart": bars, text, image };

// The first is how an output is shown unless one chooses.
function viewsOf({ values, shape, datatype, picture }) {
  if (!values.length) return ["text"];
  if (datatype === "BYTES") return ["text", "table"];
  const columns = columnsOf(shape);
  const preferred = [];
  if (picture && picture.channels > 1) preferred.push("image");
  if (values.length === columns && columns > 1 && columns <= MOST.bars) preferred.push("bar chart");
  const all = ["table", "bar chart", "text", ...(picture ? ["image"] : [])];
  return [...new Set([...preferred, ...all])];
}

function outputNode(output) {
  const node = copy("output");
  const [select, view] = [node.querySelector("select"), node.querySelector(".view")];
  const title = `${output.name} ${output.datatype} [${output.shape.join(", ")}]`;
  node.querySelector("h3").textContent = title;
  for (const name of viewsOf(output)) select.append(new Option(name, name));
  const draw = () => view.replaceChildren(VIEWS[select.value](output));
  select.addEventListener("change", draw);
  draw();
  return node;
}
