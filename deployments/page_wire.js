// --- each datatype: from text, to and from its wire form -----------------------------------------

// Numbers stay text until their datatype is known: a 64-bit integer is no JavaScript number.
const TOKEN = /[-+]?(?:Infinity|NaN|[\d.][\d.eE+-]*)|true|false/g;

function nested(text) {
  let tree;
  try {
    tree = JSON.parse(`[${text.replace(TOKEN, '"$&"')}]`);
  } catch {
    throw new Error("the data is no array of values as in JSON");
  }
  return tree.length === 1 && Array.isArray(tree[0]) ? tree[0] : tree;
}

function dimensions(tree) {
  const shape = [];
  for (let level = tree; Array.isArray(level); level = level[0]) shape.push(level.length);
  return shape;
}

function fixed(size, read, write, parse, from) {
  return {
    from,
    parse(text) {
      const tree = nested(text);
      return [tree.flat(Infinity).map(parse), dimensions(tree)];
    },
    encode(values) {
      const view = new DataView(new ArrayBuffer(size * values.length));
      values.forEach((value, index) => write(view, index * size, value));
      return new Uint8Array(view.buffer);
    },
    decode(bytes) {
      const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
      const length = bytes.byteLength / size;
      return Array.from({ length }, (_, index) => read(view, index * size));
    },
  };
}

function integer(bits, signed) {
  const low = signed ? -(2n ** BigInt(bits - 1)) : 0n;
  const high = low + 2n ** BigInt(bits) - 1n;
  const kind = `${bits === 64 ? "Big" : ""}${signed ? "Int" : "Uint"}${bits}`;
  const narrow = (value) => (bits === 64 ? value : Number(value));
  return fixed(
    bits / 8,
    (view, at) => view[`get${kind}`](at, true),
    (view, at, value) => view[`set${kind}`](at, value, true),
    (text) => {
      const value = BigInt(text);
      if (value < low || value > high) throw new Error(`${text} is out of range`);
      return narrow(value);
    },
    (number) => narrow(BigInt(Math.round(number))),
  );
}

function float(size, read, write) {
  const parse = (text) => {
    const value = Number(text);
    if (Number.isNaN(value) && !text.endsWith("NaN")) throw new Error(`${text} is no number`);
    return value;
  };
  return fixed(size, read, write, parse, (number) => number);
}

const scratch = new DataView(new ArrayBuffer(4));

function toBits(value) {
  scratch.setFloat32(0, value);
  return scratch.getUint32(0);
}

function fromBits(bits) {
  scratch.setUint32(0, bits);
  return scratch.getFloat32(0);
}

function toBrain(value) {
  if (Number.isNaN(value)) return 0x7fc0;
  const bits = toBits(value);
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

function toHalf(value) {
  const bits = toBits(value);
  const sign = (bits >>> 16) & 0x8000;
  const size = bits & 0x7fffffff;
  if (size > 0x7f800000) return sign | 0x7e00; // NaN
  if (size >= 0x477ff000) return sign | 0x7c00; // rounds to infinity
  if (size >= 0x38800000) return sign | ((size - 0x38000000 + 0xfff + ((size >>> 13) & 1)) >>> 13);
  const steps = Math.abs(value) * 2 ** 24; // below the smallest normal number
  const down = Math.floor(steps);
  const odd = down % 2 === 1;
  return sign | (steps - down > 0.5 || (steps - down === 0.5 && odd) ? down + 1 : down);
}

function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 31;
  const rest = bits & 1023;
  if (exponent === 31) return rest ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + rest / 1024) * 2 ** (exponent - 15) : rest * 2 ** -24);
}

const TRUTH = { true: true, false: false, 1: true, 0: false };

const KINDS = {
  BOOL: fixed(
    1,
    (view, at) => view.getUint8(at) !== 0,
    (view, at, value) => view.setUint8(at, value ? 1 : 0),
    (text) => {
      if (!(text in TRUTH)) throw new Error(`${text} is neither true nor false`);
      return TRUTH[text];
    },
    (number) => number > 0.5,
  ),
  FP16: float(
    2,
    (view, at) => fromHalf(view.getUint16(at, true)),
    (view, at, value) => view.setUint16(at, toHalf(value), true),
  ),
  BF16: float(
    2,
    (view, at) => fromBits(view.getUint16(at, true) * 65536),
    (view, at, value) => view.setUint16(at, toBrain(value), true),
  ),
  FP32: float(
    4,
    (view, at) => view.getFloat32(at, true),
    (view, at, value) => view.setFloat32(at, value, true),
  ),
  FP64: float(
    8,
    (view, at) => view.getFloat64(at, true),
    (view, at, value) => view.setFloat64(at, value, true),
  ),
  BYTES: {
    from: () => "",
    // A JSON array of strings, or a string a line.
    parse(text) {
      let tree = null;
      try {
        tree = text.trim().startsWith("[") ? JSON.parse(text) : null;
      } catch {
        // lines that begin like an array
      }
      tree ??= text.split("\n");
      const values = tree.flat(Infinity);
      if (values.some((value) => typeof value !== "string")) throw new Error("not only strings");
      return [values, dimensions(tree)];
    },
    encode(values) {
      const encoder = new TextEncoder();
      const elements = values.map((value) =>
        typeof value === "string" ? encoder.encode(value) : value,
      );
      const bytes = new Uint8Array(elements.reduce((all, each) => all + 4 + each.length, 0));
      const view = new DataView(bytes.buffer);
      let at = 0;
      for (const each of elements) {
        view.setUint32(at, each.length, true);
        bytes.set(each, at + 4);
        at += 4 + each.length;
      }
      return bytes;
    },
    decode(bytes) {
      const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
      const decoder = new TextDecoder();
      const values = [];
      for (let at = 0; at < bytes.byteLength; ) {
        const start = at + 4;
        at = start + view.getUint32(at, true);
        values.push(decoder.decode(bytes.subarray(start, at)));
      }
      return values;
    },
  },
};
for (const bits of [8, 16, 32, 64]) {
  KINDS[`INT${bits}`] = integer(bits, true);
  KINDS[`UINT${bits}`] = integer(bits, false);
}

