"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const SVG = "http://www.w3.org/2000/svg";
  const KEYS = ["run", "order", "similarity", "image", "method"];
  const SHAPES = {
    o: "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", s: "M-3.6-3.6h7.2v7.2h-7.2z", "^": "M0-4.4L4.2 3.4H-4.2z",
    D: "M0-4.8L4.8 0 0 4.8-4.8 0z", v: "M0 4.4L4.2-3.4H-4.2z", "<": "M-4.4 0L3.4-4.2V4.2z", ">": "M4.4 0L-3.4-4.2V4.2z",
    P: "M-1.6-4.4h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8v-3.2h2.8z",
    X: "M-4.4-2.2L-2.2-4.4 0-2.2 2.2-4.4 4.4-2.2 2.2 0 4.4 2.2 2.2 4.4 0 2.2-2.2 4.4-4.4 2.2-2.2 0z",
  };

  function draw(parent, name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  const dashes = (look) => look.dashes.map((length) => length * 2).join(" ") || "none";

  function mark(parent, look, x, y) {
    draw(parent, "path", {
      d: SHAPES[look.marker], transform: `translate(${x} ${y})`,
      fill: look.control ? "#fff" : look.colour, stroke: look.control ? look.colour : "#fff",
    });
  }

  function swatch(place, look) {
    draw(place, "line", { x1: 0, x2: 30, y1: 6, y2: 6, stroke: look.colour, "stroke-width": 2, "stroke-dasharray": dashes(look) });
    mark(place, look, 15, 6);
  }

  function choice() {
    const value = (id) => (one(`#${id}`) || { value: "" }).value;
    return {
      run: value("run"), order: value("order"), similarity: value("similarity"), image: value("image"),
      methods: new Set(all("input[name=method]:checked").map((box) => box.value)),
    };
  }

  /* Every element that names a run, order, similarity, picture or method is shown if the choice takes it in. */
  function sift(chosen) {
    const taken = (key, value) => (key === "method" ? chosen.methods.has(value) : !chosen[key] || chosen[key] === value);
    for (const element of all(KEYS.map((key) => `main [data-${key}]`).join())) {
      element.hidden = KEYS.some((key) => key in element.dataset && !taken(key, element.dataset[key]));
    }
    const score = chosen.similarity || one("#similarity").options[1].value;
    for (const element of all("[data-score]")) element.hidden = element.dataset.score !== score;
    one("#shown").textContent = score;
    for (const id of ["curves", "strips"]) one(`#${id} .empty`).hidden = all(`#${id} figure`).some((f) => !f.hidden);
  }

  /* Lines of a chart: for each stage [mean, low, high, scored, NaN], or null. */
  function series(run, order, similarity, chosen) {
    const single = chosen.image && order.image[similarity];
    return Object.entries(order.mean[similarity]).filter(([method]) => chosen.methods.has(method)).map(([method, points]) => ({
      method,
      look: data.looks[method],
      points: single ? (single[method][chosen.image] || []).map((v) => [v, null, null, v === null ? 0 : 1, v === null ? 1 : 0]) : points,
    })).filter((line) => line.points.length);
  }

  const known = (point) => point && point[0] !== null;
  const banded = (point) => known(point) && point[1] !== null;

  function plot(figure, chosen) {
    const { run, order, similarity } = figure.dataset;
    const course = data.runs[run].orders[order];
    const lines = series(data.runs[run], course, similarity, chosen);
    const box = one(".plot", figure);
    const wide = Math.max(box.clientWidth, 240);
    const longest = Math.max(...course.stages.map((name) => name.length));
    const edge = { left: 38, right: 8, top: 10, bottom: 34 + Math.min(longest, 18) * 5.2 };
    const tall = 250 + edge.bottom;
    const step = (wide - edge.left - edge.right) / course.stages.length;
    const lows = lines.flatMap((line) => line.points.filter(known).map((p) => p[1] ?? p[0]));
    const bottom = Math.min(-0.05, ...lows);
    const x = (stage) => edge.left + (stage + 0.5) * step;
    const y = (value) => edge.top + (1.05 - value) / (1.05 - bottom) * (tall - edge.top - edge.bottom);
    const page = draw(box, "svg", { viewBox: `0 0 ${wide} ${tall}`, role: "img" });
    draw(page, "title", {}, `${similarity} at each stage, ${order}: ${lines.map((line) => line.method).join(", ")}`);
    frame(page, course, { wide, tall, edge, x, y, step, bottom });
    lines.forEach((line, turn) => {
      const shift = course.joined ? 0 : 0.72 * step * ((turn + 0.5) / lines.length - 0.5);
      trace(page, line, (stage) => x(stage) + shift, y, course.joined);
    });
    lacks(page, course, lines, { tall, edge, x });
    const cursor = draw(page, "line", { y1: edge.top, y2: tall - edge.bottom, stroke: "#333", "stroke-dasharray": "2 3" });
    box.replaceChildren(page);
    const slider = one("input[type=range]", figure);
    slider.style.marginLeft = `${x(0) - 8}px`;
    slider.style.width = `${(course.stages.length - 1) * step + 16}px`;
    slider.oninput = () => read(figure, slider, course, lines, cursor, x);
    page.onclick = (event) => {
      const at = (event.clientX - page.getBoundingClientRect().left - edge.left) / step;
      slider.value = Math.max(0, Math.min(course.stages.length - 1, Math.floor(at)));
      slider.oninput();
    };
    slider.oninput();
    const missing = chosen.image && !data.runs[run].images.includes(chosen.image);
    one(".of", figure).textContent = missing ? ` (no scores of ${chosen.image} here)` : chosen.image ? ` (${chosen.image} alone)` : "";
  }

  function frame(page, course, { wide, tall, edge, x, y, step, bottom }) {
    if (!course.joined) {
      course.stages.forEach((_, stage) => stage % 2 || draw(page, "rect", {
        x: x(stage) - step / 2, y: edge.top, width: step, height: tall - edge.top - edge.bottom, fill: "#f3f3f3",
      }));
    }
    for (let tick = Math.ceil(bottom * 5) / 5; tick < 1.01; tick += 0.2) {
      const zero = Math.abs(tick) < 0.01;
      draw(page, "line", { x1: edge.left, x2: wide - edge.right, y1: y(tick), y2: y(tick), stroke: zero ? "#8a8a8a" : "#e6e6e6" });
      draw(page, "text", { x: edge.left - 5, y: y(tick) + 4, "text-anchor": "end", class: "soft" }, fixed(tick, 1));
    }
    course.stages.forEach((name, stage) => {
      const cut = name.length > 18 ? `${name.slice(0, 17)}…` : name;
      draw(page, "text", { transform: `translate(${x(stage) + 3} ${tall - edge.bottom + 30}) rotate(-45)`, "text-anchor": "end" }, cut);
    });
  }

  function trace(page, line, x, y, joined) {
    const group = draw(page, "g", { "data-line": line.method });
    const colour = line.look.colour;
    const pieces = [];
    line.points.forEach((point, stage) => {
      if (!known(point)) return;
      if (!stage || !known(line.points[stage - 1])) pieces.push([]);
      pieces[pieces.length - 1].push(stage);
    });
    for (const piece of joined ? pieces : []) {
      const band = piece.filter((stage) => banded(line.points[stage]));
      if (band.length > 1) {
        const ends = [...band.map((s) => [s, 2]), ...band.reverse().map((s) => [s, 1])];
        draw(group, "path", { d: `M${ends.map(([s, i]) => `${x(s)} ${y(line.points[s][i])}`).join("L")}z`, fill: colour, opacity: 0.15 });
      }
      draw(group, "path", {
        d: `M${piece.map((s) => `${x(s)} ${y(line.points[s][0])}`).join("L")}`, fill: "none", stroke: colour,
        "stroke-width": 2, "stroke-dasharray": dashes(line.look),
      });
    }
    for (const stage of pieces.flat()) {
      const [mean, low, high] = line.points[stage];
      if (!joined && low !== null) {
        draw(group, "line", { x1: x(stage), x2: x(stage), y1: y(low), y2: y(high), stroke: colour, "stroke-width": 1.5 });
      }
      if (!line.look.control || !joined) mark(group, line.look, x(stage), y(mean));
    }
  }

  function lacks(page, course, lines, { tall, edge, x }) {
    const counts = course.stages.map((_, stage) => lines.reduce((sum, line) => sum + ((line.points[stage] || [])[4] || 0), 0));
    if (!counts.some(Boolean)) return;
    const y = tall - edge.bottom + 14;
    draw(page, "text", { x: edge.left - 5, y, "text-anchor": "end", class: "lack" }, "NaN");
    counts.forEach((count, stage) => count && draw(page, "text", { x: x(stage), y, "text-anchor": "middle", class: "lack" }, count));
  }

  function read(figure, slider, course, lines, cursor, x) {
    const stage = Number(slider.value);
    slider.setAttribute("aria-valuetext", course.stages[stage]);
    cursor.setAttribute("x1", x(stage));
    cursor.setAttribute("x2", x(stage));
    const head = document.createElement("b");
    head.textContent = course.stages[stage];
    const sorted = [...lines].sort((a, b) => ((b.points[stage] || [])[0] ?? -9) - ((a.points[stage] || [])[0] ?? -9));
    one(".readout", figure).replaceChildren(head, ...sorted.map((line) => {
      const item = document.createElement("span");
      swatch(draw(item, "svg", { width: 30, height: 12, "aria-hidden": "true" }), line.look);
      item.append(` ${line.method} ${words(line.points[stage])}`);
      return item;
    }));
  }

  const fixed = (value, digits = 2) => value.toFixed(digits).replace(/^-(0\.0+)$/, "$1");

  function words(point) {
    if (!point) return "–";
    const lack = point[4] ? ` (${point[4]} NaN)` : "";
    if (!known(point)) return `n/a${lack}`;
    return fixed(point[0]) + (banded(point) ? ` [${fixed(point[1])}, ${fixed(point[2])}]` : "") + lack;
  }

  function show() {
    const chosen = choice();
    sift(chosen);
    for (const figure of all(".chart")) if (!figure.hidden) plot(figure, chosen);
    const boxes = all("input[name=method]").length;
    const run = chosen.run && data.runs[chosen.run].label;
    const named = [run, chosen.order, chosen.similarity, chosen.image].filter(Boolean);
    if (chosen.methods.size < boxes) named.push(`${chosen.methods.size} of ${boxes} methods`);
    one("#chosen").textContent = named.length ? `showing ${named.join(", ")}` : "showing everything";
  }

  function check(state) {
    for (const box of all("input[name=method]")) box.checked = state;
    show();
  }

  for (const place of all(".swatch")) swatch(place, data.looks[place.dataset.look]);
  for (const block of all(".copy")) {
    const button = one("button", block);
    button.onclick = () => navigator.clipboard.writeText(one("code", block).textContent).then(
      () => { button.textContent = "copied"; }, () => { getSelection().selectAllChildren(one("code", block)); });
  }
  if (matchMedia("(max-width: 44rem)").matches) {
    one("#filters details").open = false;
    for (const block of all("details.wide")) block.open = false;
  }
  const filters = one("#filters");
  filters.onsubmit = (event) => event.preventDefault();
  filters.onchange = show;
  one("#all").onclick = () => check(true);
  one("#none").onclick = () => check(false);
  let width = 0;
  new ResizeObserver(() => { document.documentElement.style.scrollPaddingTop = `${filters.offsetHeight + 8}px`; }).observe(filters);
  new ResizeObserver(() => {
    if (width !== document.body.clientWidth) { width = document.body.clientWidth; show(); }
  }).observe(document.body);
})();
