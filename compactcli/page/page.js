"use strict";
// A mark tells its label in a box: under the pointer, or with the focus that the arrow keys move.
const box = document.createElement("div");
box.className = "tip";
box.setAttribute("aria-hidden", "true"); // the label itself is what a screen reader reads
box.hidden = true;
document.body.append(box);

function show(mark, x, y) {
  box.textContent = mark.getAttribute("aria-label");
  box.hidden = false;
  const left = Math.max(8, Math.min(x + 12, document.documentElement.clientWidth - box.offsetWidth - 8));
  const below = y + 16 + box.offsetHeight < window.innerHeight;
  box.style.left = `${left}px`;
  box.style.top = `${below ? y + 16 : y - 12 - box.offsetHeight}px`;
}

function hide() {
  box.hidden = true;
}

for (const chart of document.querySelectorAll(".marks")) {
  const marks = [...chart.querySelectorAll("[role=img]")];
  const move = (from, to) => {
    marks[from].setAttribute("tabindex", "-1");
    marks[to].setAttribute("tabindex", "0");
    marks[to].focus();
  };
  chart.addEventListener("pointermove", (event) => {
    const mark = event.target.closest("[role=img]");
    if (mark) show(mark, event.clientX, event.clientY);
    else hide();
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("focusin", (event) => {
    const place = event.target.getBoundingClientRect();
    show(event.target, place.left + place.width / 2, place.top + place.height / 2);
  });
  chart.addEventListener("focusout", hide);
  chart.addEventListener("keydown", (event) => {
    const at = marks.indexOf(event.target);
    const last = marks.length - 1;
    const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") hide();
    if (at < 0 || next === undefined) return;
    event.preventDefault();
    move(at, Math.max(0, Math.min(next, last)));
  });
}

window.addEventListener("scroll", hide, { passive: true });

// On paper nothing can be opened.
const closed = [...document.querySelectorAll("details:not([open])")];
window.addEventListener("beforeprint", () => closed.forEach((each) => { each.open = true; }));
window.addEventListener("afterprint", () => closed.forEach((each) => { each.open = false; }));
