"use strict";
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const one = (selector) => document.querySelector(selector);
const root = document.documentElement;

// Theme: the system's until the button is pressed.
function toggleTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
}
one("#theme").addEventListener("click", toggleTheme);

// Passes: one tab is in the tab order, arrows move among them.
const tabs = all('[role="tab"]');
function select(tab, focus) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    one("#" + other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (focus) tab.focus();
}
tabs.forEach((tab, at) => {
  tab.addEventListener("click", () => select(tab, false));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    select(tabs[(to + tabs.length) % tabs.length], true);
  });
});
if (tabs.length) select(one('[role="tab"][aria-selected="true"]') || tabs[0], false);

// Tables: a folded row opens the rows of its layers; the filter looks into folded rows, too.
document.addEventListener("click", (event) => {
  const button = event.target.closest(".fold");
  if (!button) return;
  const expanded = button.closest("tbody").classList.toggle("open");
  button.setAttribute("aria-expanded", String(expanded));
});
for (const input of all("input[data-filters]")) {
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    const bodies = all("tbody", one("#" + input.dataset.filters));
    let shown = 0;
    for (const body of bodies) {
      body.hidden = !body.textContent.toLowerCase().includes(wanted);
      shown += body.hidden ? 0 : 1;
    }
    one("#" + input.dataset.filters + "-count").textContent = wanted ? `${shown} of ${bodies.length} rows` : "";
  });
}

// Memory: a crosshair that follows the pointer, or the arrows.
const memory = JSON.parse(one("#memory-data").textContent);
const picture = one("#memory-picture svg");
const moments = memory.parts.flatMap((part) =>
  part.after.map((after, i) => ({
    part, after, before: part.before[i],
    x: part.start + ((part.end - part.start) * (i + 0.5)) / part.after.length,
  })));
const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
line.id = "crosshair";
picture.append(line);
const size = (bytes) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; bytes >= 1024 && unit < 4; unit++) bytes /= 1024;
  return bytes.toFixed(unit ? 1 : 0) + " " + units[unit];
};
let moment = moments.reduce((best, m, i) => (m.after > moments[best].after ? i : best), 0);
function show(at) {
  moment = Math.max(0, Math.min(moments.length - 1, at));
  const { x, part, before, after } = moments[moment];
  line.setAttribute("d", `M${x} ${memory.top}V${memory.bottom}`);
  one("#readout").textContent =
    `${part.half} of graph ${part.graph}: ${size(after)} with the passes, ` +
    `${size(before)} as autograd would`;
}
if (moments.length) {
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * memory.width;
    let nearest = 0;
    moments.forEach((m, i) => {
      if (Math.abs(m.x - x) < Math.abs(moments[nearest].x - x)) nearest = i;
    });
    show(nearest);
  });
  one("#memory-picture").addEventListener("keydown", (event) => {
    const step = event.shiftKey ? 20 : 1;
    const to = { ArrowRight: moment + step, ArrowLeft: moment - step, Home: 0, End: moments.length }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
  show(moment);
}

// Shortcuts that work anywhere but in a text field.
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.key === "t") toggleTheme();
  if (event.key === "/") {
    event.preventDefault();
    const inputs = all("input[data-filters]");
    const below = inputs.find((i) => i.getBoundingClientRect().bottom > 0) || inputs[0];
    if (below) below.focus();
  }
  if (event.key >= "1" && event.key <= "9") {
    const link = all("nav a")[Number(event.key) - 1];
    if (link) link.click();
  }
});
root.dataset.readyMs = String(Math.round(performance.now()));
