"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  // Making elements.

  const fill = (node, attributes, children) => {
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  };
  const html = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
  const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

  let made = 0;
  /** A chart's svg with its title and description, which a screen reader reads in its place. */
  const drawing = (width, height, title, description) => {
    const id = `chart-${++made}`;
    return svg(
      "svg",
      { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": `${id}-t ${id}-d` },
      svg("title", { id: `${id}-t` }, title),
      svg("desc", { id: `${id}-d` }, description),
    );
  };
  const measure = (() => {
    const context = document.createElement("canvas").getContext("2d");
    return (text, font = "12px system-ui, sans-serif") => {
      context.font = font;
      return context.measureText(text).width;
    };
  })();

  /** The chart's figures as a table, made when it is first opened. */
  const dataTable = (root, caption, head, rows) => {
    let details = root.querySelector("details.data");
    const opened = details !== null && details.open;
    if (details !== null) details.remove();
    const box = html("div", { class: "box", tabindex: "0", role: "region", "aria-label": caption });
    details = html("details", { class: "data" }, html("summary", {}, "The chart as a table"), box);
    const build = () => {
      if (box.firstChild || !details.open) return;
      const cells = (values) => values.map((v, i) =>
        i ? html("td", { class: "number" }, v) : html("th", { scope: "row" }, v));
      box.append(html("table", {},
        html("thead", {}, html("tr", {}, ...head.map((h, i) => html("th", { scope: "col", class: i ? "number" : null }, h)))),
        html("tbody", {}, ...rows().map((r) => html("tr", {}, ...cells(r))))));
    };
    details.addEventListener("toggle", build);
    details.open = opened;
    root.append(details);
    build();
  };

  // Numbers and scales.

  const present = (v) => v !== null && v !== undefined;
  const grouped = (v) => v.toLocaleString("en-US");
  const short = (v) => {
    for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
      if (Math.abs(v) >= size) return `${Number((v / size).toPrecision(3))} ${unit}`;
    }
    return `${Number(v.toPrecision(3))}`;
  };
  const digits = (v) => (present(v) ? `${Number(v.toPrecision(3))}` : "");
  /** Round steps that cover low…high. */
  const ticks = (low, high, count) => {
    const raw = (high - low) / count || 1;
    const size = 10 ** Math.floor(Math.log10(raw));
    const step = size * [1, 2, 2.5, 5, 10].find((s) => s * size >= raw * 0.999);
    const marks = [];
    for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i++) marks.push(Number((i * step).toPrecision(12)));
    return marks;
  };
  const ranksText = (ranks) => ranks.replaceAll("x", "×");

  // Tables: sorting.

  const key = (row, column, kind) => {
    const cell = row.cells[column];
    const text = (cell.dataset.v ?? cell.textContent).trim();
    if (kind !== "number") return text;
    const number = Number.parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(number) ? null : number;
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  const empty = (v) => v === null || v === "";

  const sort = (table, th) => {
    const { column, kind } = th.dataset;
    const before = th.getAttribute("aria-sort");
    // Of figures people want the largest first, but of row numbers the smallest.
    const first = kind === "number" && column !== "0" ? "descending" : "ascending";
    const order = before === "none" ? first : before === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row, at) => ({ row, at, value: key(row, column, kind) }));
    rows.sort((a, b) => {
      if (empty(a.value) || empty(b.value)) return empty(a.value) - empty(b.value) || a.at - b.at;
      return sign * compare(a.value, b.value) || a.at - b.at;
    });
    body.append(...rows.map((r) => r.row));
    for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    th.setAttribute("aria-sort", order);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const button of table.querySelectorAll("th[aria-sort] button")) {
      button.addEventListener("click", () => sort(table, button.closest("th")));
    }
  }

  // The layer table: filtering.

  const layerTable = document.getElementById("layer-table");
  if (layerTable) {
    const section = document.getElementById("layers");
    const search = section.querySelector("input[type=search]");
    const boxes = [...section.querySelectorAll("input[type=checkbox]")];
    const rows = [...layerTable.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
    const apply = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const wanted = new Set(boxes.filter((b) => b.checked).map((b) => b.value));
      let shown = 0;
      for (const [row, text] of rows) {
        row.hidden = !(wanted.has(row.dataset.decision) && words.every((w) => text.includes(w)));
        shown += !row.hidden;
      }
      section.querySelector(".none").hidden = shown > 0;
      layerTable.hidden = shown === 0;
      section.querySelector(".status").textContent =
        shown === rows.length ? `${shown} layers` : `${shown} of ${rows.length} layers`;
    };
    search.addEventListener("input", apply);
    boxes.forEach((b) => b.addEventListener("change", apply));
    apply();
  }

  // Chart: figures by layer, one panel over the other.

  const PANELS = [
    { key: "latency", title: "Latency, ms", text: (v) => `${digits(v)} ms` },
    { key: "flops", title: "FLOPs", text: short },
    { key: "params", title: "Parameters", text: grouped },
    { key: "error", title: "Error", text: digits },
  ];

  /** Neighbours of one part of the model or, where those are more than there is room for, of a larger part. */
  const blocks = (layers, most) => {
    const runs = (start) => {
      const segments = [];
      layers.forEach((l, i) => {
        const name = start(l);
        if (segments.length && segments.at(-1).name === name) segments.at(-1).end = i + 1;
        else segments.push({ name, label: name.split(".").slice(-2).join("."), begin: i, end: i + 1 });
      });
      return segments;
    };
    const deepest = Math.max(1, ...layers.map((l) => l.part.split(".").length));
    for (let depth = deepest; depth > 1; depth--) {
      const segments = runs((l) => l.part.split(".").slice(0, depth).join("."));
      if (segments.length <= most) return segments;
    }
    return runs((l) => l.part.split(".")[0]);
  };

  const profile = (root, pick) => {
    const target = root.querySelector(".drawing");
    const layers = data.layers;
    const readout = html("p", { class: "readout", "aria-live": "polite" });
    target.after(readout);
    const panels = PANELS.filter(({ key: k }) =>
      layers.some((l) => (Array.isArray(l[k]) ? present(l[k][0]) : present(l[k]))));
    let at = -1;
    let show = () => {};
    const say = (i) => {
      if (i < 0) {
        readout.replaceChildren(html("span", { class: "hint" }, "Point at a layer for its figures, or use the arrow keys."));
        return;
      }
      const l = layers[i];
      const what = l.ranks ? `${l.decision} at ${ranksText(l.ranks)}` : l.decision;
      const figures = panels.map(({ key: k, title, text }) => {
        const name = title.replace(/,.*/, "");
        if (!Array.isArray(l[k])) return present(l[k]) ? `${name} ${text(l[k])}` : "";
        const [a, b] = l[k];
        return present(a) ? `${name} ${text(a)}${present(b) ? ` → ${text(b)}` : ""}` : "";
      });
      readout.replaceChildren(html("b", {}, l.name), ` ${l.op}, ${what}`,
        ...figures.filter(Boolean).map((f) => html("span", { class: "muted" }, f)));
    };
    const draw = () => {
      const width = Math.max(240, target.clientWidth);
      const left = 52, right = 4, plot = width - left - right;
      const tall = 84, gap = 34, top = 22;
      const height = top + panels.length * (tall + gap) - gap + 28;
      const node = drawing(width, height, "Figures by layer, before and after",
        `${panels.map((p) => p.title).join("; ")} of ${layers.length} layers, in the order of the network. The table below has the figures.`);
      const step = plot / Math.max(1, layers.length);
      const x = (i) => left + i * step;
      const outer = Math.max(0.6, Math.min(step * 0.8, 34)), inner = Math.max(0.4, Math.min(outer * 0.62, 20));
      const runs = blocks(layers, Math.max(2, Math.floor(plot / 64)));
      const bottom = top + panels.length * (tall + gap) - gap;
      if (runs.length <= plot / 8) {
        for (const run of runs.slice(1)) node.append(svg("path", { class: "grid", d: `M${x(run.begin)} ${top}V${bottom + 6}` }));
      }
      for (const run of runs) {
        if (measure(run.label) < (run.end - run.begin) * step - 6) {
          node.append(svg("text", { x: (x(run.begin) + x(run.end)) / 2, y: bottom + 20, "text-anchor": "middle" }, run.label));
        }
      }
      panels.forEach(({ key: k, title }, p) => {
        const base = top + p * (tall + gap) + tall;
        const values = layers.map((l) => (Array.isArray(l[k]) ? l[k] : [null, l[k]]));
        const high = Math.max(0, ...values.flat().filter(present)) || 1;
        const marks = ticks(0, high, 2);
        const y = (v) => base - (v / marks.at(-1)) * tall;
        for (const mark of marks) {
          node.append(svg("path", { class: mark ? "grid" : "axis", d: `M${left} ${y(mark)}H${width - right}` }));
          node.append(svg("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, short(mark)));
        }
        const bars = (side, wide) => values.map((pair, i) => {
          if (!present(pair[side])) return "";
          const start = x(i) + (step - wide) / 2;
          return `M${start.toFixed(2)} ${base}V${y(pair[side]).toFixed(2)}h${wide.toFixed(2)}V${base}z`;
        }).join("");
        const fine = outer < 3 ? " fine" : "";
        node.append(svg("path", { class: `before${fine}`, d: bars(0, outer) }));
        node.append(svg("path", { class: "after", d: bars(1, inner) }));
        node.append(svg("text", { class: "title", x: left, y: base - tall - 9 }, title));
      });
      const cursor = svg("rect", { class: "cursor", y: top, width: Math.max(step, 2), height: bottom - top, visibility: "hidden" });
      node.append(cursor);
      show = (i) => {
        at = i;
        cursor.setAttribute("visibility", i < 0 ? "hidden" : "visible");
        if (i >= 0) cursor.setAttribute("x", x(i));
        say(i);
      };
      node.setAttribute("tabindex", "0");
      const under = (event) => Math.floor((event.clientX - node.getBoundingClientRect().left - left) / step);
      const inside = (i) => i >= 0 && i < layers.length;
      node.addEventListener("pointermove", (event) => { const i = under(event); if (inside(i) && i !== at) show(i); });
      node.addEventListener("click", (event) => { const i = under(event); if (inside(i)) { show(i); pick(layers[i].name); } });
      node.addEventListener("keydown", (event) => {
        const last = layers.length - 1;
        const next = { ArrowRight: at + 1, ArrowLeft: at < 0 ? last : at - 1, Home: 0, End: last }[event.key];
        if (event.key === "Enter" && at >= 0) pick(layers[at].name);
        if (next === undefined) return;
        event.preventDefault();
        show(Math.min(last, Math.max(0, next)));
      });
      target.replaceChildren(node);
      if (at >= 0) show(at); else say(-1);
    };
    draw();
    const head = ["layer", ...panels.flatMap(({ key: k, title }) => (k === "error" ? ["error"] : [`${title} before`, `${title} after`]))];
    dataTable(root, "Figures by layer", head, () => layers.map((l) => [
      l.name,
      ...panels.flatMap(({ key: k }) => (Array.isArray(l[k]) ? l[k] : [l[k]]).map((v) => (!present(v) ? "" : k === "latency" || k === "error" ? digits(v) : grouped(v)))),
    ]));
    return draw;
  };

  // Chart: rank against time of one layer.

  const curve = (root) => {
    const target = root.querySelector(".drawing");
    const select = root.querySelector("select");
    const layers = data.layers.filter((l) => l.timings.length > 1);
    // First the layer with the most to see.
    const gain = (l) => l.timings.length + (present(l.latency[0]) && present(l.latency[1]) ? 1 - l.latency[1] / l.latency[0] : 0);
    for (const l of layers) select.append(html("option", { value: l.name }, l.name));
    select.value = layers.reduce((a, b) => (gain(b) > gain(a) ? b : a)).name;
    const readout = html("p", { class: "readout", "aria-live": "polite" });
    target.after(readout);
    const draw = () => {
      const layer = layers.find((l) => l.name === select.value);
      const points = layer.timings.filter((t) => present(t[1])).map(([ranks, rank, ms, ratio, spread]) =>
        ({ ranks, rank, ms, ratio, spread, chosen: ranks === layer.chosen })).sort((a, b) => a.rank - b.rank);
      const original = layer.timings.find((t) => t[0] === "original");
      const unchanged = layer.chosen === "original";
      const taken = points.find((p) => p.chosen);
      const width = Math.max(240, Math.min(target.clientWidth, 820)), height = 310;
      const left = 52, right = 20, top = 44, base = height - 44;
      const node = drawing(width, height, `Rank against time of ${layer.name}`,
        `${points.length} ranks; ${taken ? `taken: ${ranksText(taken.ranks)} at ${taken.ratio.toFixed(2)} of the original's time` : unchanged ? "the original layer was kept" : "another form was taken"}. The table below has the figures.`);
      const high = Math.max(1, ...points.map((p) => p.ratio + p.spread));
      const marks = ticks(0, high, 4);
      const y = (v) => base - (v / marks.at(-1)) * (base - top);
      const lowest = points[0].rank, highest = points.at(-1).rank;
      const margin = Math.max((highest - lowest) * 0.12, highest * 0.02, 0.5);
      const x = (r) => left + ((r - lowest + margin) / (highest - lowest + 2 * margin)) * (width - left - right);
      for (const mark of marks) {
        node.append(svg("path", { class: mark ? "grid" : "axis", d: `M${left} ${y(mark)}H${width - right}` }));
        node.append(svg("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, digits(mark)));
      }
      node.append(svg("text", { x: left, y: 14 }, "time, of the original layer’s"));
      node.append(svg("text", { x: width - right, y: height - 6, "text-anchor": "end" }, points.some((p) => p.ranks.includes("x")) ? "first rank" : "rank"));
      node.append(svg("path", { class: "dash", d: `M${left} ${y(1)}H${width - right}` }));
      node.append(svg("text", { class: "name", x: width - right, y: y(1) - 6, "text-anchor": "end" },
        `original layer, ${digits(original[2])} ms${unchanged ? ": kept" : ""}`));
      node.append(svg("path", { class: "trace", d: points.map((p, i) => `${i ? "L" : "M"}${x(p.rank)} ${y(p.ratio)}`).join("") }));
      let written = -Infinity;
      for (const p of points) {
        const cx = x(p.rank), cy = y(p.ratio);
        const few = points.length <= 24;
        if (few) node.append(svg("path", { class: "whisker", d: `M${cx} ${y(p.ratio - p.spread)}V${y(p.ratio + p.spread)}m-4 0h8M${cx - 4} ${y(p.ratio - p.spread)}h8` }));
        node.append(svg("circle", { class: "point", cx, cy, r: few ? 4 : 2.5 },
          svg("title", {}, `${ranksText(p.ranks)}: ${digits(p.ms)} ms, ${p.ratio.toFixed(3)} ± ${p.spread.toFixed(3)}`)));
        if (p.chosen) {
          node.append(svg("circle", { class: "ring", cx, cy, r: 9 }));
          const end = cx > width - 110;
          node.append(svg("text", { class: "name", x: end ? cx - 14 : cx + 14, y: cy + 22 > base - 4 ? cy - 14 : cy + 22, "text-anchor": end ? "end" : "start" }, `taken: ${ranksText(p.ranks)}`));
        }
        const wide = measure(String(p.rank));
        if (cx - wide / 2 > written + 8) {
          node.append(svg("text", { x: cx, y: base + 18, "text-anchor": "middle" }, String(p.rank)));
          written = cx + wide / 2;
        }
      }
      target.replaceChildren(node);
      readout.replaceChildren(html("b", {}, layer.name), ` ${layer.op}, `, taken
        ? `${layer.decision} at ${ranksText(taken.ranks)}: ${digits(taken.ms)} ms instead of ${digits(original[2])} ms`
        : unchanged ? `stays as it was, at ${digits(original[2])} ms` : `became ${layer.decision}, which was not timed by rank`);
      dataTable(root, `Rank against time of ${layer.name}`, ["ranks", "ms", "of the original’s time", "±", ""], () =>
        layer.timings.map(([ranks, , ms, ratio, spread]) => [ranksText(ranks), digits(ms), ratio.toFixed(3), spread.toFixed(3), ranks === layer.chosen ? "taken" : ""]));
    };
    select.addEventListener("change", draw);
    for (const button of root.querySelectorAll("button[data-step]")) {
      button.addEventListener("click", () => {
        const next = select.selectedIndex + Number(button.dataset.step);
        select.selectedIndex = (next + layers.length) % layers.length;
        draw();
      });
    }
    draw();
    return { draw, pick: (name) => { if (layers.some((l) => l.name === name)) { select.value = name; draw(); } } };
  };

  // Chart: accuracy or error against speed or cost.

  const SHAPES = [
    (x, y) => `M${x - 6} ${y}a6 6 0 1 0 12 0a6 6 0 1 0 -12 0z`,
    (x, y) => `M${x - 5.5} ${y - 5.5}h11v11h-11z`,
    (x, y) => `M${x} ${y - 7}l7 12.5h-14z`,
    (x, y) => `M${x} ${y - 7.5}l7.5 7.5l-7.5 7.5l-7.5 -7.5z`,
    (x, y) => `M${x} ${y + 7}l7 -12.5h-14z`,
  ];

  const frontier = (root) => {
    const target = root.querySelector(".drawing");
    const { y: key, title, label, percent } = root.dataset;
    const value = (v) => (percent === undefined ? `${Number(v.toPrecision(3))}` : `${v.toFixed(1)} %`);
    const draw = () => {
      const axis = root.querySelector("input:checked").value;
      const speed = axis === "speed";
      const text = (v) => (speed ? `${v.toFixed(2)} times` : axis === "latency_ms" ? `${v.toFixed(2)} ms` : grouped(v));
      const points = data.variants.filter((v) => v[key] !== null).map((v, i) => ({
        name: v.name, x: v[axis], y: percent === undefined ? v[key] : 100 * v[key], spread: speed && i ? v.speed_spread : 0, shape: SHAPES[i % SHAPES.length], first: i === 0,
      }));
      const width = Math.max(240, Math.min(target.clientWidth, 820)), height = 320;
      const left = 52, right = 28, top = 26, base = height - 48;
      const name = { speed: "speed, times the original’s", latency_ms: "latency, ms", params: "parameters", flops: "FLOPs" }[axis];
      const node = drawing(width, height, `${title} against ${name.split(",")[0]}`,
        points.map((p) => `${p.name}: ${value(p.y)} at ${text(p.x)}`).join("; "));
      const span = (values, count) => {
        const low = Math.min(...values), high = Math.max(...values);
        const room = high - low > 1e-9 * Math.abs(high) ? 0 : 0.05 * Math.abs(high) || 1; // all alike: in the middle
        return ticks(low - room, high + room, count);
      };
      const ys = span(points.map((p) => p.y), 4);
      const xs = span(points.flatMap((p) => [p.x - p.spread, p.x + p.spread]), width < 500 ? 3 : 6);
      const x = (v) => left + ((v - xs[0]) / (xs.at(-1) - xs[0])) * (width - left - right);
      const y = (v) => base - ((v - ys[0]) / (ys.at(-1) - ys[0])) * (base - top);
      for (const mark of ys) {
        node.append(svg("path", { class: "grid", d: `M${left} ${y(mark)}H${width - right}` }));
        node.append(svg("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, `${mark}`));
      }
      node.append(svg("path", { class: "axis", d: `M${left} ${base}H${width - right}` }));
      for (const mark of xs) {
        node.append(svg("path", { class: "axis", d: `M${x(mark)} ${base}v5` }));
        node.append(svg("text", { x: x(mark), y: base + 19, "text-anchor": "middle" }, speed ? `${mark}×` : axis === "latency_ms" ? `${mark}` : short(mark)));
      }
      node.append(svg("text", { x: left, y: 12 }, label));
      node.append(svg("text", { x: width - right, y: height - 8, "text-anchor": "end" }, name));
      const better = (a, b) => (speed ? a.x >= b.x : a.x <= b.x) && (key === "error" ? a.y <= b.y : a.y >= b.y) && (a.x !== b.x || a.y !== b.y);
      const best = points.filter((p) => !points.some((q) => better(q, p))).sort((a, b) => a.x - b.x);
      node.append(svg("path", { class: "dash", d: best.map((p, i) => `${i ? "L" : "M"}${x(p.x)} ${y(p.y)}`).join("") }));
      const written = [];
      for (const p of points) {
        const cx = x(p.x), cy = y(p.y);
        if (p.spread) node.append(svg("path", { class: "whisker", d: `M${x(p.x - p.spread)} ${cy}H${x(p.x + p.spread)}m0 -4v8M${x(p.x - p.spread)} ${cy - 4}v8` }));
        node.append(svg("path", { class: p.first ? "hollow" : "point", d: p.shape(cx, cy) }));
        const wide = measure(p.name, "600 12px system-ui, sans-serif");
        // Beside the point, where no other label or the edge is in the way.
        const spots = [[12, -10, "start"], [12, 20, "start"], [-12, -10, "end"], [-12, 20, "end"], [0, -16, "middle"], [0, 26, "middle"]].map(([dx, dy, anchor]) => {
          const tx = cx + dx, ty = cy + dy, start = anchor === "start" ? tx : anchor === "end" ? tx - wide : tx - wide / 2;
          return { tx, ty, anchor, box: [start, ty - 12, start + wide, ty + 3] };
        });
        const free = spots.find(({ box }) => box[0] > left && box[2] < width && box[1] > 16 && box[3] < base &&
          !written.some((w) => box[0] < w[2] && w[0] < box[2] && box[1] < w[3] && w[1] < box[3])) ?? spots[0];
        written.push(free.box);
        node.append(svg("text", { class: "title", x: free.tx, y: free.ty, "text-anchor": free.anchor }, p.name));
      }
      target.replaceChildren(node);
    };
    for (const input of root.querySelectorAll("input")) input.addEventListener("change", draw);
    draw();
    return draw;
  };

  // The graph: counterparts, and the keyboard.

  const graph = document.querySelector(".blocks");
  if (graph) {
    let marked = [];
    const mark = (node) => {
      marked.forEach((n) => n.classList.remove("paired"));
      marked = node ? [...node.closest("tbody").querySelectorAll(".node")].filter((n) => n.dataset.pair === node.dataset.pair) : [];
      marked.forEach((n) => n.classList.add("paired"));
    };
    const over = (event) => event.target.closest(".node");
    graph.addEventListener("pointerover", (event) => mark(over(event)));
    graph.addEventListener("pointerleave", () => mark(null));
    graph.addEventListener("focusin", (event) => mark(over(event)));
    graph.addEventListener("focusout", () => mark(null));
    // One stop of the tab key a block; arrow keys within it.
    for (const block of graph.children) block.querySelector(".node")?.setAttribute("tabindex", "0");
    graph.addEventListener("keydown", (event) => {
      const node = over(event);
      if (!node || !event.key.startsWith("Arrow")) return;
      const side = node.closest("td").cellIndex;
      const nodes = [...node.closest(".blocks > details").querySelectorAll(".node")];
      const column = nodes.filter((n) => n.closest("td").cellIndex === side);
      const across = nodes.filter((n) => n.closest("td").cellIndex !== side && n.closest("tbody") === node.closest("tbody"));
      const next = {
        ArrowDown: column[column.indexOf(node) + 1],
        ArrowUp: column[column.indexOf(node) - 1],
        [side ? "ArrowLeft" : "ArrowRight"]: across.find((n) => n.dataset.pair === node.dataset.pair) ?? across[0],
      }[event.key];
      event.preventDefault();
      if (!next) return;
      nodes.forEach((n) => n.setAttribute("tabindex", n === next ? "0" : "-1"));
      next.focus();
    });
    for (const button of document.querySelectorAll("button[data-blocks]")) {
      button.addEventListener("click", () => {
        for (const block of graph.children) block.open = button.dataset.blocks === "open";
      });
    }
  }

  // Putting it together.

  const redraw = [];
  const charts = (kind) => document.querySelector(`[data-chart=${kind}]`);
  for (const chart of document.querySelectorAll("[data-chart=frontier]")) redraw.push(frontier(chart));
  let pick = () => {};
  if (charts("curve")) {
    const made = curve(charts("curve"));
    redraw.push(made.draw);
    pick = made.pick;
  }
  if (charts("profile")) redraw.push(profile(charts("profile"), (name) => pick(name)));
  let width = document.documentElement.clientWidth;
  addEventListener("resize", () => {
    const now = document.documentElement.clientWidth;
    if (now === width) return; // on phones the height changes while scrolling
    width = now;
    redraw.forEach((draw) => draw());
  });
})();
