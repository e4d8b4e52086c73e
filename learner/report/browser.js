// The trajectory browser: a list that draws only what is in sight, searched, filtered and sorted.

const ROW_HEIGHT = 28; // as in page.css
const SNIPPET_TOKENS = 60;
const SNIPPET_BEFORE = 10; // characters before what was searched for
const COLUMNS = [
  { name: "step", value: (answer, group) => group.step, shown: String },
  { name: "reward", value: (answer) => answer.reward, shown: short },
  { name: "advantage", value: (answer) => answer.advantage, shown: short },
  { name: "tokens", value: (answer) => answer.tokens[1] - answer.tokens[0], shown: String },
  { name: "stale", value: (answer) => answer.staleness, shown: short, title: "staleness of its oldest token" },
  {
    name: "ratio", shown: short, value: (answer) => answer.ratio, title: "the probability ratio farthest from 1",
    key: (answer) => (answer.ratio === null ? null : Math.abs(Math.log(answer.ratio))),
  },
];

class Browser {
  constructor(known, columns, texts) {
    Object.assign(this, { known, columns, texts });
    this.list = byId("list");
    this.detail = new GroupView(byId("detail"), known, columns, texts);
    this.searched = null; // prompt and answer of each, in lower case, made at the first search
    this.sort = { name: "step", isDown: true };
    this.selected = -1; // place in `found`
    byId("sample").textContent = known.sample;
    this.fillRuns();
    this.drawHead();
    this.listen();
    this.refresh();
  }

  fillRuns() {
    byId("run").append(make("option", { value: "" }, "all runs"));
    this.known.runs.forEach((run, r) => byId("run").append(make("option", { value: r }, run.name)));
    byId("of-run").hidden = this.known.runs.length === 1;
  }

  listen() {
    let pending = 0;
    byId("filters").addEventListener("input", () => {
      clearTimeout(pending);
      pending = setTimeout(() => this.refresh(), 60);
    });
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    this.list.addEventListener("scroll", () => this.drawRows());
    new ResizeObserver(() => this.drawRows()).observe(this.list);
    this.list.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.select(Number(row.dataset.place));
    });
    this.list.addEventListener("keydown", (event) => this.move(event));
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !byId("trajectories").hidden && !event.target.matches("input, select")) {
        event.preventDefault();
        byId("search").focus();
      }
    });
  }

  move(event) {
    const page = Math.max(Math.floor(this.list.clientHeight / ROW_HEIGHT) - 1, 1);
    const to = {
      ArrowDown: this.selected + 1, ArrowUp: this.selected - 1, PageDown: this.selected + page,
      PageUp: this.selected - page, Home: 0, End: this.found.length - 1,
    }[event.key];
    if (to === undefined || !this.found.length) return;
    event.preventDefault();
    this.select(Math.max(0, Math.min(this.found.length - 1, to)));
  }

  drawHead() {
    const buttons = COLUMNS.map(({ name, title = name }) => {
      const isPressed = this.sort.name === name;
      const arrow = isPressed ? (this.sort.isDown ? " ↓" : " ↑") : "";
      const button = make("button", { type: "button", title, "aria-pressed": isPressed }, name + arrow);
      button.addEventListener("click", () => {
        this.sort = { name, isDown: isPressed ? !this.sort.isDown : true };
        this.drawHead();
        this.refresh();
      });
      return button;
    });
    byId("head").replaceChildren(...buttons, make("span", {}, "answer"));
  }

  text(n) {
    this.searched ??= this.known.answers.map((answer) =>
      `${this.texts.text("prompts", this.known.groups[answer.group].prompt)}\n${this.texts.text("tokens", answer.tokens)}`
        .toLowerCase());
    return this.searched[n];
  }

  // Places in known.answers of what the filters let through, in order.
  find() {
    const { answers, groups } = this.known;
    const number = (id, otherwise) => (byId(id).value === "" ? otherwise : Number(byId(id).value));
    const words = this.words = byId("search").value.toLowerCase();
    const kind = byId("kind").value, run = number("run", null);
    const [stepFrom, stepTo] = [number("step-from", -Infinity), number("step-to", Infinity)];
    const [rewardFrom, rewardTo] = [number("reward-from", null), number("reward-to", null)];
    const isIn = (answer, n) => {
      const group = groups[answer.group];
      if (kind !== "all" && group.isExpert !== (kind === "experts")) return false;
      if (run !== null && group.run !== run) return false;
      if (group.step < stepFrom || group.step > stepTo) return false;
      if (rewardFrom !== null && !(answer.reward !== null && answer.reward >= rewardFrom)) return false;
      if (rewardTo !== null && !(answer.reward !== null && answer.reward <= rewardTo)) return false;
      if (byId("has-signal").checked && !answer.advantage) return false;
      if (byId("is-truncated").checked && !answer.isTruncated) return false;
      return !words || this.text(n).includes(words);
    };
    const { key, value } = COLUMNS.find(({ name }) => name === this.sort.name);
    const keys = answers.map((answer) => (key ?? value)(answer, groups[answer.group]));
    const direction = this.sort.isDown ? -1 : 1;
    return answers.flatMap((answer, n) => (isIn(answer, n) ? [n] : [])).sort((a, b) => {
      if (keys[a] === null || keys[b] === null) return (keys[a] === null) - (keys[b] === null) || a - b;
      return direction * (keys[a] - keys[b]) || a - b;
    });
  }

  refresh() {
    this.found = this.find();
    const numLeftOut = this.known.numLeftOut ? `; ${this.known.numLeftOut} more in the runs, left out evenly` : "";
    byId("count").textContent = `${this.found.length} of ${this.known.answers.length}${numLeftOut}`;
    byId("spacer").style.height = `${this.found.length * ROW_HEIGHT}px`;
    this.list.scrollTop = 0;
    this.select(Math.min(0, this.found.length - 1));
  }

  select(place) {
    const answer = this.known.answers[this.found[place]];
    this.selected = place;
    const top = place * ROW_HEIGHT;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    else if (top + ROW_HEIGHT > this.list.scrollTop + this.list.clientHeight) {
      this.list.scrollTop = top + ROW_HEIGHT - this.list.clientHeight;
    }
    this.drawRows();
    if (answer) this.detail.show(answer);
    else byId("detail").replaceChildren(this.known.answers.length ? "Nothing is like that." : "The runs hold no excerpts.");
  }

  drawRows() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW_HEIGHT) - 5);
    const last = Math.min(this.found.length, first + Math.ceil(this.list.clientHeight / ROW_HEIGHT) + 10);
    const rows = [];
    for (let place = first; place < last; place++) rows.push(this.row(place));
    for (const row of this.list.querySelectorAll(".row")) row.remove();
    this.list.append(...rows);
    if (this.selected >= 0) this.list.setAttribute("aria-activedescendant", `place-${this.selected}`);
  }

  row(place) {
    const answer = this.known.answers[this.found[place]];
    const group = this.known.groups[answer.group];
    const row = make("div", {
      class: "row", role: "option", id: `place-${place}`, "data-place": place, style: `top:${place * ROW_HEIGHT}px`,
      "aria-selected": place === this.selected, "aria-setsize": this.found.length, "aria-posinset": place + 1,
    });
    for (const { value, shown } of COLUMNS) row.append(make("span", {}, shown(value(answer, group))));
    const text = make("span", { class: "snippet" });
    if (group.isExpert) text.append(make("span", { class: "tag" }, "expert "));
    text.append(...this.snippet(this.found[place]));
    row.append(text);
    return row;
  }

  // The begin of an answer, or the place where it says what is searched for.
  snippet(n) {
    const onOneLine = (text) => text.replaceAll("\n", "↵");
    if (this.words) {
      const text = this.text(n), at = text.indexOf(this.words), end = at + this.words.length;
      const before = `${at > SNIPPET_BEFORE ? "…" : ""}${text.slice(Math.max(0, at - SNIPPET_BEFORE), at)}`;
      return [onOneLine(before), make("mark", {}, onOneLine(text.slice(at, end))), onOneLine(text.slice(end, end + 60))];
    }
    const [start, end] = this.known.answers[n].tokens;
    return [onOneLine(this.texts.text("tokens", [start, Math.min(end, start + SNIPPET_TOKENS)]))];
  }
}
