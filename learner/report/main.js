// What happens when the page opens: the charts, then the browser.

function drawRuns(known, view, redraw) {
  const facts = Object.keys(known.runs[0].facts);
  const head = make("tr", {}, make("th", {}, "run"), ...facts.map((name) => make("th", {}, name)));
  byId("runs").append(make("thead", {}, head));
  const body = make("tbody");
  known.runs.forEach((run, r) => {
    const box = make("input", { type: "checkbox", "aria-label": `show ${run.name}` });
    box.checked = true;
    box.addEventListener("change", () => {
      if (box.checked) view.runs.add(r);
      else view.runs.delete(r);
      redraw();
    });
    const name = known.runs.length === 1
      ? [run.name]
      : [box, " ", make("span", { class: "key", style: `border-color:var(--s${r % 8})` }), run.name];
    body.append(make("tr", {}, make("td", {}, ...name), ...facts.map((fact) => make("td", {}, String(run.facts[fact] ?? "–")))));
    for (const note of run.notes) byId("notes").append(make("li", {}, `${run.name}: ${note}`));
  });
  byId("runs").append(body);
}

function drawCharts(known) {
  const view = {
    axis: "x", smoothing: 1, runs: new Set(known.runs.keys()), names: known.runs.map((run) => run.name),
    numRuns: known.runs.length,
  };
  const redraw = () => {
    const shown = known.charts.map((chart) => new ChartView(chart, view).figure);
    byId("figures").replaceChildren(...(shown.length ? shown : ["No step has been taken yet."]));
  };
  drawRuns(known, view, redraw);
  byId("axis").addEventListener("change", (event) => {
    view.axis = event.target.value;
    redraw();
  });
  byId("smoothing").addEventListener("change", (event) => {
    view.smoothing = Number(event.target.value);
    redraw();
  });
  redraw();
}

function showView() {
  const name = location.hash === "#trajectories" ? "trajectories" : "charts";
  for (const id of ["charts", "trajectories"]) byId(id).hidden = id !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  scrollTo(0, 0);
}

async function main() {
  const known = await readKnown();
  byId("written").textContent = `written ${known.written}`;
  addEventListener("hashchange", showView);
  showView();
  drawCharts(known);
  const columns = await readColumns(known.layout);
  new Browser(known, columns, new Texts(columns));
  document.documentElement.dataset.readyMs = Math.round(performance.now());
}

main().catch((error) => {
  byId("failure").hidden = false;
  byId("failure").textContent = `The page cannot be drawn: ${error.message}. It wants a browser of 2023 or later.`;
});
