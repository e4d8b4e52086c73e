// A chart: lines over steps or hours, bars and stairs, with a cursor that pointer and arrow keys move.

const WIDTH = 460, HEIGHT = 210, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 30;
const DASHES = ["", "6 4", "2 3", "9 3 2 3"];

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// With one run a color tells the fields apart, with several the runs, and then dashes the fields.
function styleOf(series, labels, numRuns) {
  const n = labels.indexOf(series.label);
  return numRuns === 1
    ? { color: `var(--s${n % 8})`, dash: "" }
    : { color: `var(--s${series.run % 8})`, dash: DASHES[n % DASHES.length] };
}

function trailingMean(values, window) {
  return values.map((value, i) => {
    if (value === null) return null;
    const some = values.slice(Math.max(0, i - window + 1), i + 1).filter((one) => one !== null);
    return some.reduce((sum, one) => sum + one, 0) / some.length;
  });
}

function ticksOf(low, high, count) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step) ticks.push(tick);
  return ticks;
}

function extentOf(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value === null) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
}

function rangeOf(values, fromZero) {
  let [low, high] = extentOf(values);
  if (fromZero || (low >= 0 && low < high / 2)) low = Math.min(low, 0);
  if (low === 0 && high === 0) high = 1;
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const room = (high - low) * 0.05;
  return [low === 0 ? 0 : low - room, high + room];
}

class ChartView {
  // `view`: `axis` (x or t), `smoothing` (points), `runs` (those shown), `names` and `numRuns`.
  constructor(chart, view) {
    this.chart = chart;
    this.view = view;
    this.labels = [...new Set(chart.series.map((series) => series.label))];
    this.series = chart.series.filter((series) => view.runs.has(series.run)).map((series) => ({
      ...series,
      ...styleOf(series, this.labels, view.numRuns),
      at: chart.kind === "lines" ? series[view.axis] : series.x,
      smooth: chart.kind === "lines" && view.smoothing > 1 ? trailingMean(series.y, view.smoothing) : series.y,
    }));
    this.xName = chart.kind === "lines" && view.axis === "t" ? "hours" : chart.x;
    this.figure = make("figure", {}, this.caption());
    this.readout = make("output", { "aria-live": "polite" });
    this.figure.append(this.draw(), this.readout);
  }

  caption() {
    const caption = make("figcaption", {}, make("h2", {}, this.chart.title));
    if (this.labels.length > 1) {
      const legend = make("span", { class: "legend" });
      for (const label of this.labels) {
        const { color, dash } = styleOf({ label, run: 0 }, this.labels, this.view.numRuns);
        const key = svg("svg", { width: 24, height: 8 });
        const ink = this.view.numRuns === 1 ? color : "var(--faint)";
        key.append(svg("line", { x1: 0, x2: 24, y1: 4, y2: 4, stroke: ink, "stroke-width": 2, "stroke-dasharray": dash }));
        legend.append(key, label);
      }
      caption.append(legend);
    }
    if (this.chart.note) caption.append(make("span", { class: "note" }, this.chart.note));
    return caption;
  }

  draw() {
    const isBars = this.chart.kind !== "lines";
    const xs = this.series.flatMap((series) => series.at);
    const ys = this.series.flatMap((series) => [...series.y, ...(series.low ?? []), ...(series.high ?? [])]);
    let [left, right] = extentOf(xs);
    if (this.chart.kind === "bars" || left === right) [left, right] = [left - 0.6, right + 0.6];
    const [bottom, top] = rangeOf(ys, isBars);
    this.x = (value) => LEFT + ((value - left) / (right - left)) * (WIDTH - LEFT - RIGHT);
    this.y = (value) => HEIGHT - BOTTOM - ((value - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
    const image = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0, "aria-label": this.description(),
    });
    for (const tick of ticksOf(bottom, top, 4)) {
      image.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: this.y(tick), y2: this.y(tick) }));
      image.append(svg("text", { x: LEFT - 5, y: this.y(tick) + 4, "text-anchor": "end" }, short(tick)));
    }
    for (const tick of ticksOf(left, right, 6)) {
      if (this.xName !== "hours" && !Number.isInteger(tick)) continue;
      image.append(svg("text", { x: this.x(tick), y: HEIGHT - BOTTOM + 14, "text-anchor": "middle" }, short(tick)));
    }
    image.append(svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 3, "text-anchor": "end" }, this.xName));
    this.series.forEach((series, n) => image.append(...this.marks(series, n)));
    this.cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    image.append(this.cursor);
    this.follow(image);
    return image;
  }

  marks(series, n) {
    if (this.chart.kind === "bars") {
      const width = 0.8 / this.series.length;
      return series.at.map((x, i) => svg("rect", {
        x: this.x(x - 0.4 + n * width), width: Math.max(this.x(width) - this.x(0) - 1, 1), fill: series.color,
        y: this.y(series.y[i]), height: this.y(0) - this.y(series.y[i]),
      }));
    }
    const ink = { class: "line", stroke: series.color, "stroke-dasharray": series.dash };
    if (this.chart.kind === "stairs") {
      const steps = series.y.map((y, i) => `L${this.x(series.at[i])} ${this.y(y)}H${this.x(series.at[i + 1])}`);
      return [svg("path", { ...ink, d: `M${this.x(series.at[0])} ${this.y(0)}${steps.join("")}V${this.y(0)}` })];
    }
    const marks = [svg("path", { ...ink, d: this.path(series.at, series.smooth) })];
    if (series.smooth !== series.y) {
      marks.unshift(svg("path", { ...ink, class: "line raw", d: this.path(series.at, series.y) }));
    }
    series.low?.forEach((low, i) => marks.push(svg("line", {
      class: "interval", stroke: series.color, x1: this.x(series.at[i]), x2: this.x(series.at[i]), y1: this.y(low),
      y2: this.y(series.high[i]),
    })));
    const present = series.y.map((y, i) => [series.at[i], series.smooth[i]]).filter(([, y]) => y !== null);
    if (present.length <= 40) {
      for (const [x, y] of present) marks.push(svg("circle", { cx: this.x(x), cy: this.y(y), r: 2.2, fill: series.color }));
    }
    return marks;
  }

  path(xs, ys) {
    let path = "";
    ys.forEach((y, i) => {
      if (y !== null) path += `${path ? "L" : "M"}${this.x(xs[i]).toFixed(1)} ${this.y(y).toFixed(1)}`;
    });
    return path;
  }

  description() {
    const ends = this.series.map((series) => {
      const present = series.y.filter((y) => y !== null);
      return `${this.view.names[series.run]} ${series.label}: from ${short(present[0])} to ${short(present.at(-1))}`;
    });
    return `${this.chart.title}. ${ends.join("; ")}`;
  }

  follow(image) {
    const places = [...new Set(this.series.flatMap((series) => series.at))].sort((a, b) => a - b);
    let at = -1;
    const go = (to) => {
      at = Math.max(0, Math.min(places.length - 1, to));
      this.show(places[at]);
    };
    image.addEventListener("pointermove", (event) => {
      const box = image.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      let nearest = 0;
      places.forEach((place, i) => {
        if (Math.abs(this.x(place) - x) < Math.abs(this.x(places[nearest]) - x)) nearest = i;
      });
      if (places.length) go(nearest);
    });
    image.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined || !places.length) return;
      event.preventDefault();
      go(by === Infinity ? places.length : by === -Infinity ? 0 : at + by);
    });
  }

  // What every series says at `place`, or at its nearest point before it.
  show(place) {
    this.cursor.setAttribute("visibility", "visible");
    this.cursor.setAttribute("x1", this.x(place));
    this.cursor.setAttribute("x2", this.x(place));
    const said = this.series.map((series) => {
      let i = series.at.length - 1;
      while (i > 0 && (series.at[i] > place || series.y[i] === null || series.y[i] === undefined)) i--;
      const names = [this.view.numRuns > 1 ? this.view.names[series.run] : "", this.labels.length > 1 ? series.label : ""];
      const range = series.low ? ` (${short(series.low[i])} to ${short(series.high[i])})` : "";
      return `${names.filter(Boolean).join(" ")} ${short(series.smooth[i])}${range}`;
    });
    this.readout.textContent = `${this.xName === "optimizer step" ? "step" : this.xName} ${short(place)}: ${said.join(" · ")}`;
  }
}
