// Text from tokens. A token may end within a character: its bytes wait for the token that completes it.

class Texts {
  constructor(columns) {
    this.columns = columns;
    this.starts = new Uint32Array(columns.pieceSizes.length + 1);
    columns.pieceSizes.forEach((size, i) => (this.starts[i + 1] = this.starts[i] + size));
  }

  bytes(place) {
    return this.columns.pieces.subarray(this.starts[place], this.starts[place + 1]);
  }

  // One string for each token of `column` in [first, end).
  pieces(column, [first, end]) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    const found = [];
    for (let i = first; i < end; i++) {
      found.push(decoder.decode(this.bytes(this.columns[column][i]), { stream: true }));
    }
    const rest = decoder.decode();
    if (rest && found.length) found[found.length - 1] += rest;
    return found;
  }

  text(column, [first, end]) {
    const tokens = this.columns[column].subarray(first, end);
    let size = 0;
    for (const token of tokens) size += this.columns.pieceSizes[token];
    const bytes = new Uint8Array(size);
    size = 0;
    for (const token of tokens) {
      bytes.set(this.bytes(token), size);
      size += this.columns.pieceSizes[token];
    }
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
  }
}

// What is known of one token; log-probs in nats, null where there is none.
function tokenAt(columns, i) {
  const nats = (value) => (value === NOTHING ? null : value / PER_NAT);
  const [policy, behavior] = [nats(columns.policy[i]), nats(columns.behavior[i])];
  return {
    policy, behavior, version: columns.versions[i],
    p: policy === null ? null : Math.exp(policy),
    ratio: policy === null || behavior === null ? null : Math.exp(policy - behavior),
    phi: policy === null ? null : Math.exp(policy) * (1 - Math.exp(policy)),
  };
}
