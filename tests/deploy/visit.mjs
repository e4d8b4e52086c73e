// Visits a report as a person would, in headless Chromium, and prints as JSON what was to be seen.
// node visit.mjs NODE_MODULES PAGE SCREENSHOTS MAX_OPEN_MS
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, page, screenshots, maxOpenMs] = process.argv.slice(2);
const { chromium } = createRequire(`${modules}/`)("playwright-core");

const browser = await chromium.launch({
  executablePath: "/usr/bin/chromium",
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
  ],
});
const seen = { requests: [], errors: [] };

async function open(options) {
  const context = await browser.newContext({ viewport: { width: 1500, height: 950 }, ...options });
  const tab = await context.newPage();
  tab.on("request", (request) => seen.requests.push(request.url().split("#")[0]));
  tab.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));
  tab.on("pageerror", (error) => seen.errors.push(error.message));
  const started = Date.now();
  await tab.goto(pathToFileURL(page).href);
  await tab.waitForFunction(() => document.documentElement.dataset.readyMs);
  const drawn = Number(await tab.evaluate(() => document.documentElement.dataset.readyMs));
  return [tab, { all: Date.now() - started, drawn }];
}

const texts = (tab, selector) => tab.locator(selector).allTextContents();
const count = (tab) => tab.locator("#count").textContent();
// Filters wait for the last keystroke, with a timer of the page: of two that were set in turn, the shorter runs first.
const settle = (tab) => tab.evaluate(() => new Promise((done) => setTimeout(done, 250)));
const rowAt = (tab, place) => tab.locator(`#list .row[data-place='${place}']`);

async function lookAtCharts(tab) {
  const reward = tab.locator("figure").first();
  const hover = async (share) => {
    const box = await reward.locator("svg").last().boundingBox();
    await tab.mouse.move(box.x + box.width * share, box.y + box.height / 2);
    return reward.locator("output").textContent();
  };
  const lines = () => reward.locator("path.line").count();
  const charts = { titles: await texts(tab, "figure h2"), runs: await texts(tab, "#runs tbody td:first-child") };
  charts.facts = await texts(tab, "#runs tbody tr:first-child td");
  charts.drawn = await tab.locator("figure").evaluateAll((figures) =>
    Object.fromEntries(figures.map((figure) => [
      figure.querySelector("h2").textContent,
      [figure.querySelectorAll("path.line, rect").length, figure.querySelectorAll(".interval").length],
    ])));
  charts.hovered = await hover(0.98);
  charts.linesOfTwo = await lines();
  await tab.locator("#runs input").last().uncheck();
  charts.linesOfOne = await lines();
  charts.hoveredOne = await hover(0.98);
  await tab.locator("#runs input").first().uncheck();
  charts.linesOfNone = await lines();
  await tab.locator("#runs input").first().check();
  await tab.locator("#runs input").last().check();
  await tab.selectOption("#smoothing", "20");
  charts.linesSmoothed = await lines();
  await tab.selectOption("#axis", "t");
  charts.hoveredHours = await hover(0.98);
  await tab.selectOption("#axis", "x");
  await tab.selectOption("#smoothing", "1");
  await reward.locator("svg").last().focus();
  await tab.keyboard.press("Home");
  charts.atHome = await reward.locator("output").textContent();
  await tab.keyboard.press("ArrowRight");
  charts.oneRight = await reward.locator("output").textContent();
  charts.description = await reward.locator("svg").last().getAttribute("aria-label");
  return charts;
}

async function lookAtList(tab) {
  const column = (n) => texts(tab, `#list .row > :nth-child(${n})`);
  await rowAt(tab, 10).waitFor(); // hidden, the list had no height, and drew ten rows
  const list = { all: await count(tab), rowsDrawn: await tab.locator("#list .row").count() };
  await tab.keyboard.press("/");
  await tab.keyboard.type("łódź");
  await settle(tab);
  list.searched = await count(tab);
  list.marked = await texts(tab, "#list mark");
  list.sample = await tab.locator("#sample").textContent();
  await tab.screenshot({ path: `${screenshots}/searched.png` });
  list.searchedAnswer = await tab.locator(".answer.chosen .text").textContent();
  await tab.fill("#search", "nobody ever said this");
  await settle(tab);
  list.nothing = [await count(tab), await tab.locator("#detail").textContent()];
  const searched = Date.now();
  await tab.fill("#search", "question 1: WHERE");
  await tab.waitForFunction((before) => document.getElementById("count").textContent !== before, list.nothing[0]);
  list.searchMs = Date.now() - searched;
  list.searchedPrompts = await count(tab);
  await tab.fill("#search", "");
  await tab.selectOption("#kind", "answers");
  await tab.check("#has-signal");
  await settle(tab);
  list.withSignal = await count(tab);
  await tab.uncheck("#has-signal");
  await tab.fill("#reward-to", "0.5");
  await settle(tab);
  list.unrewarded = await count(tab);
  await tab.fill("#reward-to", "");
  await tab.fill("#reward-from", "0.5");
  await tab.fill("#step-to", "5");
  await settle(tab);
  list.filtered = await count(tab);
  list.filteredRewards = await column(2);
  await tab.fill("#reward-from", "");
  await tab.fill("#step-to", "");
  await tab.selectOption("#run", "1");
  await settle(tab);
  list.ofRun = await count(tab);
  await tab.selectOption("#run", "");
  await tab.check("#is-truncated");
  await settle(tab);
  list.truncated = await count(tab);
  await tab.uncheck("#is-truncated");
  await settle(tab);
  await tab.click("#head button:nth-child(3)");
  list.advantagesDown = (await column(3)).map(Number);
  await tab.click("#head button:nth-child(3)");
  list.advantagesUp = (await column(3)).map(Number);
  const sorted = Date.now();
  await tab.click("#head button:nth-child(6)");
  await tab.locator("#head button:nth-child(6)[aria-pressed=true]").waitFor();
  list.sortMs = Date.now() - sorted;
  list.ratios = (await column(6)).map(Number);
  await tab.click("#head button:nth-child(1)");
  await tab.click("#head button:nth-child(1)");
  await tab.locator("#list").focus();
  await tab.keyboard.press("End");
  list.lastSelected = await tab.locator("#list [aria-selected=true]").getAttribute("aria-posinset");
  await tab.keyboard.press("ArrowUp");
  list.oneUp = await tab.locator("#list [aria-selected=true]").getAttribute("aria-posinset");
  await tab.keyboard.press("Home");
  await tab.evaluate(() => (document.getElementById("list").scrollTop = 28 * 2000));
  await rowAt(tab, 2003).waitFor();
  list.scrolledTo = await tab.locator("#list .row").evaluateAll((rows) => rows.map((row) => Number(row.dataset.place)));
  await rowAt(tab, 2003).click();
  list.clicked = await tab.locator("#list [aria-selected=true]").getAttribute("aria-posinset");
  await tab.locator("#list").focus();
  await tab.keyboard.press("Home");
  return list;
}

const colors = (tab, selector) =>
  tab.locator(selector).evaluateAll((spans) => spans.map((span) => span.style.backgroundColor));

async function lookAtGroup(tab) {
  const answers = tab.locator(".answer");
  const group = {
    title: await tab.locator("#detail h2").textContent(),
    prompt: await tab.locator(".prompt").textContent(),
    answers: await texts(tab, ".answer .text"),
    facts: await texts(tab, ".answer h3"),
    boxes: await answers.evaluateAll((cards) => cards.map((card) => card.getBoundingClientRect().toJSON())),
    ratioColors: await colors(tab, ".answer.chosen .text span"),
  };
  await tab.locator(".answer.chosen .text span").nth(3).hover();
  group.hovered = await tab.locator("#token").textContent();
  await tab.locator(".answer.chosen .text").focus();
  await tab.keyboard.press("ArrowRight");
  group.oneRight = await tab.locator("#token").textContent();
  await tab.screenshot({ path: `${screenshots}/ratios.png` });
  await tab.fill("#step-from", "7");
  await tab.fill("#step-to", "7");
  await settle(tab);
  await tab.selectOption("#coloring", "version");
  group.versionAnswer = await tab.locator(".answer.chosen .text").textContent();
  group.versionLegend = await texts(tab, ".legend i");
  group.versionColors = await colors(tab, ".answer.chosen .text span");
  await tab.screenshot({ path: `${screenshots}/versions.png` });
  await tab.selectOption("#coloring", "ratio");
  await tab.fill("#step-from", "");
  await tab.fill("#step-to", "");
  await tab.selectOption("#kind", "experts");
  await settle(tab);
  group.experts = await count(tab);
  group.expertTitle = await tab.locator("#detail h2").textContent();
  group.expertText = await tab.locator(".answer .text").textContent();
  group.expertColors = await colors(tab, ".answer .text span");
  await tab.locator(".answer .text span").nth(2).hover();
  group.expertHovered = await tab.locator("#token").textContent();
  await tab.screenshot({ path: `${screenshots}/experts.png` });
  return group;
}

try {
  const [tab, openMs] = await open({ colorScheme: "light" });
  seen.openMs = [openMs];
  await tab.screenshot({ path: `${screenshots}/charts.png` });
  seen.charts = await lookAtCharts(tab);
  await tab.screenshot({ path: `${screenshots}/all-charts.png`, fullPage: true });
  await tab.click("nav a:last-child");
  await tab.locator("#trajectories").waitFor();
  seen.chartsHidden = await tab.locator("#charts").isHidden();
  seen.list = await lookAtList(tab);
  seen.group = await lookAtGroup(tab);
  const [dark, darkMs] = await open({ colorScheme: "dark" });
  seen.openMs.push(darkMs);
  await dark.screenshot({ path: `${screenshots}/dark-charts.png` });
  await dark.click("nav a:last-child");
  await dark.screenshot({ path: `${screenshots}/dark-trajectories.png` });
  const [narrow, narrowMs] = await open({ viewport: { width: 420, height: 900 } });
  seen.openMs.push(narrowMs);
  seen.isWiderThanItsWindow = await narrow.evaluate(() => document.documentElement.scrollWidth > innerWidth);
  await narrow.screenshot({ path: `${screenshots}/narrow.png` });
  // What else this machine does takes its time too: the quickest opening is nearest to the page's own.
  while (Math.min(...seen.openMs.map(({ all }) => all)) >= maxOpenMs && seen.openMs.length < 10) {
    const [again, againMs] = await open();
    seen.openMs.push(againMs);
    await again.context().close();
  }
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
