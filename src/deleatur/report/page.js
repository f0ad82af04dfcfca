"use strict";
const veils = [...document.querySelectorAll(".veil")], all = document.getElementById("all");
const show = (veil, on) => veil.setAttribute("aria-pressed", String(on));
const shown = () => veils.some(v => v.getAttribute("aria-pressed") === "true");
let timer = 0;
function arm(on) {
  clearTimeout(timer);
  all.classList.toggle("armed", on);
  all.textContent = on ? `Press again to show ${veils.length} images` : shown() ? "Cover all images" : "Show all covered images";
  if (on) timer = setTimeout(arm, 6000, false);
}
veils.forEach(v => v.addEventListener("click", () => { show(v, v.getAttribute("aria-pressed") !== "true"); arm(false); }));
all.addEventListener("click", () => {
  if (shown() || all.classList.contains("armed")) { const on = !shown(); veils.forEach(v => show(v, on)); arm(false); } else arm(true);
});
addEventListener("keydown", e => { if (e.key === "Escape") { veils.forEach(v => show(v, false)); arm(false); } });
arm(false);
