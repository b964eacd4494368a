"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (name) => document.getElementById(name);
  const svg = document.querySelector("#graph svg");
  const tip = get("tip"), side = get("side"), slider = get("count"), told = get("told");
  const edges = [], hits = [], nodes = new Map();
  for (const path of svg.querySelectorAll(".edge")) edges[path.dataset.edge] = path;
  for (const path of svg.querySelectorAll(".hit")) hits[path.dataset.edge] = path;
  for (const group of svg.querySelectorAll(".node")) nodes.set(group.dataset.node, group);
  const help = [...side.childNodes];
  let count = data.edges.length, pinned = null;

  const goesInto = (edge, node) => (data.reads[node] || [node]).includes(edge.into);
  const shown = (number) => number < count;

  // Everything that others have named is put in as text.
  const put = (tag, text, into) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (into) into.append(made);
    return made;
  };

  const list = (title, found, say) => {
    put("h3", found.length ? title : title + ": no edge that is shown", side);
    const table = put("table", "", side);
    for (const edge of found) {
      const row = put("tr", "", table);
      put("td", say(edge), row);
      put("td", edge.words + (edge.kind === "estimate" && data.mixed ? " est." : ""), row);
    }
  };

  const clear = () => {
    svg.classList.remove("busy");
    for (const each of [...edges, ...nodes.values()]) each.classList.remove("on", "chosen");
    side.replaceChildren(...help);
  };

  const light = (numbers) => {
    svg.classList.add("busy");
    for (const number of numbers) {
      const edge = data.edges[number];
      edges[number].classList.add("on");
      for (const name of [edge.from, edge.into]) nodes.get(name).classList.add("on");
    }
  };

  const choose = (node) => {
    clear();
    const into = [], out = [], numbers = [];
    data.edges.forEach((edge, number) => {
      if (!shown(number)) return;
      if (goesInto(edge, node)) into.push(edge);
      if (edge.from === node) out.push(edge);
      if (goesInto(edge, node) || edge.from === node) numbers.push(number);
    });
    light(numbers);
    nodes.get(node).classList.add("on", "chosen");
    side.replaceChildren();
    put("h2", node, side);
    const what = data.about[node];
    if (what) {
      put("p", what, side);
      for (const [head, reads] of Object.entries(data.reads)) {
        if (reads.includes(node) && nodes.has(head)) nodes.get(head).classList.add("on");
      }
    } else {
      list("Out of it", out, (edge) => "→ " + edge.name.split("->")[1]);
    }
    list("Into it", into, (edge) => edge.name.split("->")[0] + " → " + edge.name.split("->")[1]);
  };

  const back = () => (pinned ? choose(pinned) : clear());

  const say = (number, event) => {
    const edge = data.edges[number];
    tip.textContent = edge.name + (edge.words ? ": " + edge.words : "") +
      (edge.kind ? " (" + edge.kind + ")" : "");
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, window.innerWidth - box.width - 4);
    const top = event.clientY + 18 + box.height > window.innerHeight
      ? event.clientY - box.height - 10 : event.clientY + 18;
    tip.style.transform = `translate(${Math.max(4, left)}px, ${top}px)`;
  };

  const limit = (most) => {
    count = most;
    const used = new Set();
    data.edges.forEach((edge, number) => {
      edges[number].classList.toggle("off", !shown(number));
      hits[number].classList.toggle("off", !shown(number));
      if (shown(number)) { used.add(edge.from); used.add(edge.into); }
    });
    for (const [name, group] of nodes) {
      const reads = data.reads[name] || [];
      group.classList.toggle("empty", !used.has(name) && !reads.some((each) => used.has(each)));
    }
    const last = data.edges[count - 1];
    const words = (number) => number.toLocaleString("en-US");
    told.textContent = count === data.total ? `all ${words(count)}` :
      `the ${words(count)} strongest of ${words(data.total)}` +
      (last.size ? ` (of size ${last.size} or more)` : "");
    back();
  };

  hits.forEach((path, number) => {
    path.addEventListener("pointermove", (event) => {
      say(number, event);
      if (!pinned && !edges[number].classList.contains("on")) { clear(); light([number]); }
    });
    path.addEventListener("pointerleave", () => { tip.hidden = true; back(); });
  });
  for (const [name, group] of nodes) {
    group.addEventListener("pointerenter", () => choose(name));
    group.addEventListener("pointerleave", back);
    group.addEventListener("focus", () => choose(name));
    group.addEventListener("blur", back);
    const pin = (event) => { pinned = pinned === name ? null : name; back(); event.stopPropagation(); };
    group.addEventListener("click", pin);
    group.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pin(event); }
    });
  }
  svg.addEventListener("click", () => { pinned = null; clear(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { pinned = null; clear(); }
  });
  get("fit").addEventListener("change", (event) => {
    svg.classList.toggle("fitted", event.target.checked);
  });
  if (slider) {
    slider.addEventListener("input", () => limit(Number(slider.value)));
    limit(Number(slider.value));
  }
  // In a narrow window the logits may lie beside what is seen.
  const top = nodes.get("logits"), graph = get("graph");
  if (top && graph.scrollWidth > graph.clientWidth) {
    const box = top.getBoundingClientRect(), seen = graph.getBoundingClientRect();
    if (box.right > seen.right) graph.scrollLeft += (box.left + box.right - seen.left - seen.right) / 2;
  }
})();
