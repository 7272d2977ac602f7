// What is drawn when: each layer when it comes near to what is seen or a link leads past it, all of it
// before printing.

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
  // What is drawn above a heading moves it, and where too little is below it cannot come to the
  // top: both are drawn before anyone goes there.
  const reach = (fragment) => {
    const target = document.getElementById(fragment.slice(1));
    if (!target) return null;
    for (const node of [...shows.keys()]) {
      const above = node.compareDocumentPosition(target) & Node.DOCUMENT_POSITION_FOLLOWING;
      const below = document.documentElement.getBoundingClientRect().bottom;
      if (!above && below - target.getBoundingClientRect().top > window.innerHeight) break;
      show(node);
    }
    return target;
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (link) reach(link.hash);
  });
  window.addEventListener("hashchange", () => reach(location.hash)?.scrollIntoView());
  reach(location.hash);
  window.addEventListener("beforeprint", () => {
    for (const node of [...shows.keys()]) show(node);
  });
}
