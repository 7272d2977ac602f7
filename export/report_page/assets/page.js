// What is drawn when: each layer when it comes near to what is seen, all of it before printing.

{
  const content = JSON.parse(document.getElementById("data").textContent);
  const opened = new Map();
  const layerOf = (node) => {
    const number = Number(node.dataset.layer);
    if (!opened.has(number)) opened.set(number, openLayer(content.layers[number]));
    return opened.get(number);
  };
  const shows = new Map();
  for (const section of document.querySelectorAll("section.layer"))
    shows.set(section, () => showEdges(section, layerOf(section)));
  for (const box of document.querySelectorAll("details.inputs"))
    shows.set(box, () => showInputs(box, layerOf(box)));

  const show = (node) => {
    const draw = shows.get(node);
    shows.delete(node);
    if (draw) draw();
  };
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        near.unobserve(entry.target);
        show(entry.target);
      }
    },
    { rootMargin: "600px" },
  );
  for (const node of shows.keys()) near.observe(node);
  window.addEventListener("beforeprint", () => {
    for (const node of [...shows.keys()]) show(node);
  });
}
