// A group in full: its prompt, its answers side by side, every token coloured by what is asked for.

const BLUE = "0,114,178", ORANGE = "213,94,0", GREEN = "0,158,115";
// By age; one for all that are older.
const VERSION_COLORS = [
  "0,158,115", "0,114,178", "204,121,167", "213,94,0", "230,159,0", "86,180,233", "240,228,66", "136,34,85", "128,128,128",
];
const colorOfAge = (age) => tint(VERSION_COLORS[Math.min(age, VERSION_COLORS.length - 1)], 0.6);
const tint = (color, share) => `rgba(${color},${(0.65 * Math.min(Math.max(share, 0), 1)).toFixed(3)})`;

// Each says the background of a token, "" where it has nothing to say, and its legend.
const COLORINGS = {
  ratio: {
    name: "probability ratio",
    color: ({ ratio }) => {
      if (ratio === null) return "";
      const octaves = Math.log2(ratio);
      return tint(octaves < 0 ? ORANGE : BLUE, Math.abs(octaves));
    },
    legend: () => [["½ or less", tint(ORANGE, 1)], ["1", tint(BLUE, 0)], ["2 or more", tint(BLUE, 1)]],
    says: "π_θ at training / π_b at sampling",
  },
  version: {
    name: "policy version",
    color: ({ version }, step) => (version < 0 ? "" : colorOfAge(step - 1 - version)),
    legend: (step, versions) => versions.map((version) => [
      `${version} (${step - 1 - version} old)`, colorOfAge(step - 1 - version),
    ]),
    says: "the version that sampled, and its staleness",
  },
  phi: {
    name: "φ = p(1 − p)",
    color: ({ phi }) => (phi === null ? "" : tint(GREEN, phi / 0.25)),
    legend: () => [["0", tint(GREEN, 0)], ["⅛", tint(GREEN, 0.5)], ["¼", tint(GREEN, 1)]],
    says: "largest where the policy is undecided",
  },
  none: { name: "nothing", color: () => "", legend: () => [], says: "" },
};

class GroupView {
  constructor(element, known, columns, texts) {
    Object.assign(this, { element, known, columns, texts });
    this.coloring = "ratio";
  }

  show(answer) {
    this.group = this.known.groups[answer.group];
    this.answers = this.known.answers.filter((one) => one.group === answer.group);
    this.chosen = answer;
    this.draw();
  }

  draw() {
    const { group } = this;
    const coloring = COLORINGS[group.isExpert && this.coloring !== "none" ? "phi" : this.coloring];
    const run = this.known.runs[group.run];
    const title = group.isExpert ? `expert row ${group.id}` : `group ${group.id} from ${group.actor}`;
    const select = make("select", { id: "coloring", "aria-label": "colour tokens by" });
    for (const [key, { name }] of Object.entries(COLORINGS)) select.append(make("option", { value: key }, name));
    select.value = group.isExpert && this.coloring !== "none" ? "phi" : this.coloring;
    select.addEventListener("change", () => {
      this.coloring = select.value;
      this.draw();
      byId("coloring").focus();
    });
    const legend = make("span", { class: "legend" });
    for (const [name, color] of coloring.legend(group.step, this.versions())) {
      legend.append(make("i", { style: `background:${color}` }, name));
    }
    legend.append(coloring.says);
    this.token = make("output", { id: "token", "aria-live": "polite" }, "point at a token, or go to an answer and use the arrow keys");
    this.element.replaceChildren(
      make("div", { class: "head" },
        make("h2", {}, `${this.known.runs.length > 1 ? `${run.name}, ` : ""}step ${group.step}, ${title}`),
        make("label", {}, "colour by ", select), legend, this.token),
      make("div", { class: "prompt text", tabindex: 0, "aria-label": "Prompt" }, this.texts.text("prompts", group.prompt)),
      make("div", { class: group.isExpert ? "answers alone" : "answers" }, ...this.answers.map((answer) => this.card(answer, coloring))),
    );
  }

  versions() {
    const found = new Set();
    for (const { tokens: [first, end] } of this.answers) {
      for (let i = first; i < end; i++) if (this.columns.versions[i] >= 0) found.add(this.columns.versions[i]);
    }
    return [...found].sort((a, b) => b - a);
  }

  card(answer, coloring) {
    const facts = make("h3");
    const say = (name, value) => facts.append(make("span", {}, `${name} `, make("b", {}, value)));
    if (this.group.isExpert) {
      say("mean φ", short(answer.phi));
    } else {
      facts.append(`#${answer.number + 1}`);
      say("reward", short(answer.reward));
      say("advantage", short(answer.advantage));
      say("staleness", short(answer.staleness));
    }
    say("tokens", String(answer.tokens[1] - answer.tokens[0]));
    if (answer.isTruncated) facts.append(make("b", {}, "cut off"));
    const name = this.group.isExpert ? "Demonstration" : `Answer ${answer.number + 1}`;
    const body = make("div", { class: "text", tabindex: 0, "aria-label": name }, ...this.spans(answer, coloring));
    this.follow(body, answer);
    return make("div", { class: answer === this.chosen ? "answer chosen" : "answer" }, facts, body);
  }

  spans(answer, coloring) {
    return this.texts.pieces("tokens", answer.tokens).map((piece, n) => {
      const token = tokenAt(this.columns, answer.tokens[0] + n);
      const span = document.createElement("span");
      span.textContent = piece;
      span.dataset.n = n;
      const color = coloring.color(token, this.group.step);
      if (color) span.style.backgroundColor = color;
      if (token.policy === null) span.className = "reply";
      return span;
    });
  }

  follow(body, answer) {
    let at = -1;
    const go = (to) => {
      this.element.querySelector(".at")?.classList.remove("at");
      at = Math.max(0, Math.min(body.children.length - 1, to));
      body.children[at]?.classList.add("at");
      this.token.textContent = this.describe(answer, at, body.children[at]?.textContent ?? "");
    };
    body.addEventListener("pointerover", (event) => {
      if (event.target.dataset.n !== undefined) go(Number(event.target.dataset.n));
    });
    body.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      go(at + by);
      body.children[at]?.scrollIntoView({ block: "nearest" });
    });
  }

  describe(answer, n, piece) {
    const { p, behavior, ratio, phi, version } = tokenAt(this.columns, answer.tokens[0] + n);
    const parts = [`token ${n + 1} ${JSON.stringify(piece)}`];
    if (p === null) parts.push("bears no loss");
    else parts.push(`π_θ ${p.toFixed(3)}`);
    if (behavior !== null) parts.push(`π_b ${Math.exp(behavior).toFixed(3)}`);
    if (ratio !== null) parts.push(`ratio ${ratio.toFixed(3)}`);
    if (version >= 0) parts.push(`version ${version}, ${this.group.step - 1 - version} old`);
    if (this.group.isExpert && p !== null) {
      const weight = { phi, is: p, none: 1 }[this.known.runs[this.group.run].weighting];
      parts.push(`φ ${phi.toFixed(3)}`, `weight here ${short(weight)}`);
    }
    return parts.join(" · ");
  }
}
