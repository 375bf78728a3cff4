"use strict";
// Texts of runs are only ever set as textContent: whatever a model wrote stays text.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const report = read("data");
  const element = (name, classes = "", text) => {
    const made = document.createElement(name);
    if (classes) made.className = classes;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const number = (value) => (Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4)));

  // ---- Light and dark ------------------------------------------------------------------------------------------------

  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const setTheme = (theme) => {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  let stored = null;
  try { stored = localStorage.getItem("rlaif-theme"); } catch { /* a file's page may have no storage */ }
  setTheme(themes.includes(stored) ? stored : "auto");
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme || "auto") + 1) % themes.length];
    setTheme(next);
    try { localStorage.setItem("rlaif-theme", next); } catch { /* as above */ }
    redraw();
  });
  system.addEventListener("change", () => redraw());

  // ---- Charts --------------------------------------------------------------------------------------------------------

  const hiddenRuns = new Set();
  const touch = matchMedia("(pointer: coarse)").matches;
  const recoloured = (value) => {
    if (typeof value === "string") return report.dark[value] || value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(recoloured);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, recoloured(v)]));
    return value;
  };
  const colour = (name) => {
    // The browser's own answer to light-dark(): plotly understands plain colours only.
    const probe = element("i");
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  };
  const themed = (figure, colours) => {
    const { data, layout } = isDark() ? recoloured(figure) : structuredClone(figure);
    for (const trace of data) if (trace.meta && hiddenRuns.has(trace.meta.run)) trace.visible = false;
    Object.assign(layout, {
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: colours.text },
      hoverlabel: { bgcolor: colours.card, bordercolor: colours.line, font: { color: colours.text }, namelength: 30 },
      dragmode: touch ? false : "zoom", // a finger scrolls the page
    });
    for (const axis of [layout.xaxis, layout.yaxis]) Object.assign(axis, { gridcolor: colours.line, linecolor: colours.line });
    return [data, layout];
  };
  const palette = () => ({ text: colour("--text"), card: colour("--card"), line: colour("--line") });
  const config = { responsive: true, displaylogo: false, showTips: false, displayModeBar: touch ? false : "hover", modeBarButtons: [["toImage", "resetScale2d"]] };
  let colours = palette();
  const draw = (place) => {
    const [data, layout] = themed(report.charts[place.dataset.chart], colours);
    Plotly.react(place, data, layout, config);
    place.dataset.drawn = "yes";
  };
  const places = [...document.querySelectorAll("[data-chart]")];
  const redraw = () => {
    colours = palette();
    for (const place of places) if (place.dataset.drawn) draw(place);
  };
  const inSight = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      inSight.unobserve(target);
      if (!target.dataset.drawn) draw(target);
    }
  }, { rootMargin: "300px" });
  const drawRest = () => {
    // One at a time in between, so that the page answers meanwhile; what is folded away waits until it is opened.
    const next = places.find((place) => !place.dataset.drawn && !place.closest("details:not([open])"));
    root.dataset.drawn = next ? "some" : "all";
    if (!next) return;
    draw(next);
    setTimeout(drawRest, 0);
  };
  setTimeout(() => {
    // Reading plotly takes a second, so the page is there before it is asked to.
    const plotly = element("script", "", document.getElementById("plotly").textContent);
    document.head.append(plotly);
    for (const place of places) inSight.observe(place);
    setTimeout(drawRest, 100);
  }, 30);
  for (const chip of document.querySelectorAll("button[data-run]")) {
    chip.addEventListener("click", () => {
      const run = Number(chip.dataset.run);
      const shown = hiddenRuns.delete(run);
      if (!shown) hiddenRuns.add(run);
      chip.setAttribute("aria-pressed", String(shown));
      redraw();
    });
  }

  // ---- Samples -------------------------------------------------------------------------------------------------------

  const form = document.getElementById("filters");
  if (!form) return;
  const PAGE = 20;
  const FOLD = 600; // characters
  const { prompts, groups, rows, verdicts } = read("sample-data");
  groups.forEach((group) => Object.assign(group, { rows: [], verdicts: [] }));
  rows.forEach((row) => groups[row.g].rows.push(row));
  verdicts.forEach((verdict) => groups[verdict.g].verdicts.push(verdict));
  const undecided = (v) => v.fwd !== undefined && v.rev !== undefined && (v.fwd - 0.5) * (v.rev - 0.5) < 0;
  const against = (v) => v.human !== undefined && v.p !== undefined && (v.human - 0.5) * (v.p - 0.5) < 0;
  const searchable = (group) => {
    group.searchable ??= [prompts[group.p], group.id, ...group.rows.flatMap((r) => [r.text, r.label, r.failure, r.evidence && JSON.stringify(r.evidence)]),
      ...group.verdicts.flatMap((v) => [v.failed, v.principle, ...(v.why || [])])].filter(Boolean).join("\n").toLowerCase();
    return group.searchable;
  };

  const kinds = [...new Set(groups.map((group) => group.kind))];
  for (const kind of kinds) form.kind.append(new Option(kind, kind));
  const offered = {
    kind: kinds.length > 1,
    show: true,
    step: groups.some((group) => group.step !== undefined),
    score: rows.some((row) => row.score !== undefined),
  };
  for (const label of form.querySelectorAll("[data-needs]")) label.hidden = !offered[label.dataset.needs];

  const asked = () => {
    const text = (name) => (form[name] ? form[name].value.trim() : "");
    const bound = (name, otherwise) => (text(name) === "" || Number.isNaN(Number(text(name))) ? otherwise : Number(text(name)));
    return {
      search: text("search").toLowerCase(), run: text("run") === "" ? null : Number(text("run")), kind: text("kind"),
      show: text("show"), order: text("order"), byStep: text("step_low") + text("step_high") !== "",
      byScore: text("score_low") + text("score_high") !== "",
      steps: [bound("step_low", -Infinity), bound("step_high", Infinity)],
      scores: [bound("score_low", -Infinity), bound("score_high", Infinity)],
    };
  };
  const within = (value, [low, high]) => value !== undefined && value >= low && value <= high;
  const rowFits = (row, want) =>
    (want.run === null || row.r === want.run) &&
    (!want.byScore || within(row.score, want.scores)) &&
    (want.show !== "failed" || row.failure !== undefined) &&
    (want.show !== "judged" || row.score !== undefined);
  const groupFits = (group, want) => {
    if (want.kind && group.kind !== want.kind) return false;
    if (want.byStep && !within(group.step, want.steps)) return false;
    const ofRun = want.run === null || group.rows.some((row) => row.r === want.run);
    const verdictFits = ofRun && !want.byScore && group.verdicts.some((v) =>
      ({ failed: v.failed !== undefined, judged: v.p !== undefined, place: undecided(v), people: against(v) })[want.show]);
    const rowsFit = !["place", "people"].includes(want.show) && group.rows.some((row) => rowFits(row, want));
    return (verdictFits || rowsFit) && (!want.search || searchable(group).includes(want.search));
  };
  const best = (group, pick) => pick(...group.rows.filter((row) => row.score !== undefined).map((row) => row.score));
  const ordered = (found, order) => {
    if (order === "new") return found.reverse().sort((a, b) => (b.step ?? 0) - (a.step ?? 0));
    if (order !== "low" && order !== "high") return found;
    const [pick, sign] = order === "low" ? [Math.min, 1] : [Math.max, -1];
    const keys = new Map(found.map((group) => [group, sign * best(group, pick)]));
    return found.sort((a, b) => (keys.get(a) === keys.get(b) ? 0 : keys.get(a) - keys.get(b)));
  };

  const put = (into, text, search) => {
    if (!search) { into.textContent = text; return into; }
    const pattern = new RegExp(search.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "giu");
    let from = 0;
    for (const found of text.matchAll(pattern)) {
      into.append(text.slice(from, found.index), element("mark", "", found[0]));
      from = found.index + found[0].length;
    }
    into.append(text.slice(from));
    return into;
  };
  const folding = (classes, text, search) => {
    const box = element("div", classes);
    const body = put(element("div", "text"), text, search);
    box.append(body);
    if (text.length > FOLD || text.split("\n").length > 12) {
      body.classList.add("folded");
      const more = element("button", "unfold", `Show all ${text.length.toLocaleString("en")} characters`);
      more.type = "button";
      more.addEventListener("click", () => { body.classList.remove("folded"); more.remove(); });
      box.append(more);
    }
    return box;
  };
  const bars = (probabilities) => {
    const box = element("span", "bars");
    const most = Math.max(...probabilities, 1e-9);
    box.title = probabilities.map((p, k) => `${k + 1}: ${number(p)}`).join("\n");
    for (const p of probabilities) box.append(Object.assign(element("i"), { style: `height:${(34 * p) / most}px` }));
    return box;
  };
  const evidence = (found, search) => {
    const list = element("dl");
    for (const [key, value] of Object.entries(found)) {
      const cell = element("dd");
      if (key === "probabilities" && Array.isArray(value) && value.every((p) => typeof p === "number")) cell.append(bars(value));
      else put(cell, typeof value === "string" ? value : typeof value === "number" ? number(value) : JSON.stringify(value), search);
      const pair = element("div");
      pair.append(element("dt", "", key.replaceAll("_", " ")), cell);
      list.append(pair);
    }
    return list;
  };
  const unfolding = (title, open, ...content) => {
    const box = element("details");
    box.open = open;
    box.append(element("summary", "", title), ...content);
    return box;
  };
  const letters = (k) => (k < 26 ? String.fromCharCode(65 + k) : String(k + 1));

  const responseBox = (row, letter, want) => {
    const box = element("div", "response");
    const head = element("header");
    if (report.runs.length > 1) head.append(element("span", `chip run-${row.r}`, report.runs[row.r]));
    if (letter) head.append(element("span", "muted", letter));
    if (row.label) head.append(element("b", "", row.label));
    if (row.score !== undefined) head.append(Object.assign(element("span", "score", number(row.score)), { title: "score" }));
    if (row.failure !== undefined) head.append(element("span", "score fail", `failed: ${row.failure}`));
    box.append(head, folding("", row.text || "(empty)", want.search));
    const told = [row.tokens !== undefined && `${row.tokens} tokens`, row.cut && "cut at the limit", row.version !== undefined && `weights ${row.version}`];
    const foot = element("footer", "muted", told.filter(Boolean).join(" · "));
    if (foot.textContent) box.append(foot);
    if (row.evidence) {
      const open = Boolean(want.search) && JSON.stringify(row.evidence).toLowerCase().includes(want.search);
      box.append(unfolding(row.evidence.critique ? "principle and critique" : "judge evidence", open, evidence(row.evidence, want.search)));
    }
    return box;
  };
  const verdictLine = (v, letterOf, want) => {
    const line = element("li");
    const [a, b] = [v.a, v.b].map((place) => `${letterOf.get(rows[place])} ${rows[place].label}`);
    const sides = element("b", "", `${a} vs ${b}: `);
    let said = "not judged";
    if (v.failed !== undefined) said = `failed: ${v.failed}`;
    else if (v.p !== undefined) said = undecided(v) ? "a tie, the place decides" : v.p === 0.5 ? "a tie" : `${v.p > 0.5 ? a : b} is better`;
    line.append(sides, element("span", v.failed !== undefined ? "fail" : "", said));
    const told = [];
    if (v.p !== undefined) told.push(`P(${letterOf.get(rows[v.a])} better) ${number(v.p)}`);
    if (v.fwd !== undefined) told.push(`shown first ${number(v.fwd)}`);
    if (v.rev !== undefined) told.push(`shown second ${number(v.rev)}`);
    if (v.human !== undefined) told.push(`people ${number(v.human)}${against(v) ? ", against the judge" : ""}`);
    if (v.principle) told.push(`principle ${v.principle}`);
    line.append(element("div", "muted", told.join(" · ")));
    (v.why || []).forEach((text, k) => {
      const shown = Boolean(want.search) && text.toLowerCase().includes(want.search);
      line.append(unfolding(v.why.length > 1 ? `rationale, order ${k + 1}` : "rationale", shown, folding("", text, want.search)));
    });
    if (v.judge) line.append(unfolding("judge", false, evidence(v.judge, "")));
    return line;
  };
  const card = (group, want) => {
    const box = element("article", "card sample");
    const head = element("div", "muted");
    if (group.step !== undefined) head.append(element("span", "", `step ${group.step.toLocaleString("en")}`));
    if (group.id !== undefined) head.append(element("span", "", String(group.id)));
    head.append(element("span", "", group.kind));
    const letterOf = new Map(group.rows.map((row, k) => [row, letters(k)]));
    const grid = element("div", "responses");
    const shown = group.rows.filter((row) => want.run === null || row.r === want.run);
    for (const row of shown) grid.append(responseBox(row, group.verdicts.length ? letterOf.get(row) : "", want));
    box.append(head, folding("prompt", prompts[group.p] || "(no prompt)", want.search), grid);
    if (group.verdicts.length) {
      const list = element("ul", "verdicts");
      list.append(...group.verdicts.map((v) => verdictLine(v, letterOf, want)));
      box.append(list);
    }
    return box;
  };

  const cards = document.getElementById("cards");
  const [earlier, later] = ["earlier", "later"].map((id) => document.getElementById(id));
  let found = [];
  let page = 0;
  const show = () => {
    const want = asked();
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    cards.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map((group) => card(group, want)));
    document.getElementById("page").textContent = `${page + 1} of ${pages}`;
    earlier.disabled = page === 0;
    later.disabled = page >= pages - 1;
  };
  const filter = () => {
    const want = asked();
    found = ordered(groups.filter((group) => groupFits(group, want)), want.order);
    page = 0;
    const count = (n) => n.toLocaleString("en");
    document.getElementById("count").textContent =
      `${count(found.length)} of ${count(groups.length)} prompts, ${count(rows.length)} responses in all`;
    show();
  };
  const turn = (by) => {
    page += by;
    show();
    document.getElementById("samples").scrollIntoView();
  };
  earlier.addEventListener("click", () => turn(-1));
  later.addEventListener("click", () => turn(1));
  let waiting = 0;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
  performance.mark("samples"); // for the benchmark
})();
