// What the page was given: what is known of runs, groups and answers as JSON, and columns of all tokens.

const NOTHING = -32768; // in a column of log-probs
const PER_NAT = 1000;
const KINDS = { uint8: Uint8Array, int16: Int16Array, int32: Int32Array, uint32: Uint32Array };

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const letters = atob(base64);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

async function unpack(id) {
  const packed = new Blob([bytesOf(document.getElementById(id).textContent)]);
  return new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function readKnown() {
  return JSON.parse(new TextDecoder().decode(await unpack("known")));
}

// Typed arrays by name.
async function readColumns(layout) {
  const buffer = await unpack("tokens");
  const columns = {};
  for (const [name, { kind, start, length }] of Object.entries(layout)) {
    columns[name] = new KINDS[kind](buffer, start, length);
  }
  return columns;
}

// An element with attributes, and children that are elements or text.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const byId = (id) => document.getElementById(id);

function short(number) {
  if (number === null || number === undefined || Number.isNaN(number)) return "–";
  const size = Math.abs(number);
  for (const [unit, suffix] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e4, " k"]]) {
    if (size >= unit) return `${Number((number / (unit === 1e4 ? 1e3 : unit)).toPrecision(3))}${suffix}`;
  }
  return size !== 0 && size < 1e-2 ? number.toExponential(1) : String(Number(number.toPrecision(3)));
}
