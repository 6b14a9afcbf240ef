"use strict";
// The map of the embedding: the point nearest to the pointer, or the next one by arrow keys, shows its image.
(() => {
  const svg = document.querySelector(".map svg");
  if (!svg) return;
  const known = JSON.parse(document.getElementById("map-data").textContent);
  const points = [...svg.querySelectorAll("circle")];
  const places = points.map((point) => [+point.getAttribute("cx"), +point.getAttribute("cy")]);
  const [tip, thumb] = [document.getElementById("tip"), document.getElementById("thumb")];
  const scale = 96 / known.side;
  thumb.style.backgroundSize = `${known.columns * 96}px auto`;
  thumb.classList.toggle("pixels", known.side < 64);
  let shown = -1;

  function show(index) {
    if (index === shown) return;
    shown = index;
    svg.classList.toggle("active", index >= 0);
    tip.hidden = index < 0;
    points.forEach((point, i) => {
      point.classList.toggle("same", index >= 0 && known.labels[i] === known.labels[index]);
      point.classList.toggle("here", i === index);
    });
    if (index < 0) return;
    const [column, row] = [index % known.columns, Math.floor(index / known.columns)];
    thumb.style.backgroundPosition = `-${column * known.side * scale}px -${row * known.side * scale}px`;
    document.getElementById("tip-name").textContent = known.classes[known.labels[index]];
    document.getElementById("tip-note").textContent = known.names[index];
    // In the map's own pixels, on the side of the point that has room.
    const box = svg.getBoundingClientRect();
    const unit = box.width / svg.viewBox.baseVal.width;
    const [x, y] = places[index].map((value) => value * unit);
    const left = x > box.width / 2 ? x - tip.offsetWidth - 14 : x + 14;
    tip.style.left = `${Math.max(4, Math.min(left, box.width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, Math.min(y - 60, box.height - tip.offsetHeight - 4))}px`;
  }

  function nearest(event) {
    const box = svg.getBoundingClientRect();
    const unit = svg.viewBox.baseVal.width / box.width;
    const [x, y] = [(event.clientX - box.left) * unit, (event.clientY - box.top) * unit];
    let [best, closest] = [-1, (24 * Math.max(unit, 1)) ** 2];
    places.forEach(([px, py], i) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < closest) [best, closest] = [i, distance];
    });
    return best;
  }

  svg.addEventListener("pointermove", (event) => show(nearest(event)));
  svg.addEventListener("pointerdown", (event) => show(nearest(event)));
  svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(-1));
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") show(-1);
    if (!step) return;
    event.preventDefault();
    show((shown + step + points.length) % points.length);
  });
})();
