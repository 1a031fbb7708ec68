(() => {
  const config = {
    background: null, font: "system-ui, sans-serif", padding: 2, view: { stroke: null }, locale: {},
    axis: { labelColor: "currentColor", titleColor: "currentColor", gridColor: "currentColor", gridOpacity: 0.12, domainColor: "currentColor",
            domainOpacity: 0.4, tickColor: "currentColor", tickOpacity: 0.4, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", labelOverlap: true },
    legend: { labelColor: "currentColor", titleColor: "currentColor", labelFontSize: 12 },
    text: { color: "currentColor", fontSize: 12 },
  };
  const options = { renderer: "svg", actions: false, config, tooltip: { disableDefaultStyle: false }, logLevel: 1 };
  const draw = async (box) => {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "wanted";
    const spec = JSON.parse(box.nextElementSibling.textContent);
    await vegaEmbed(box, spec, options);
    const svg = box.querySelector("svg");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", spec.description);
    for (const part of svg.querySelectorAll("[aria-roledescription], g[role], path[role]")) {
      for (const name of ["role", "aria-roledescription", "aria-label"]) part.removeAttribute(name);
      part.setAttribute("aria-hidden", "true");
    }
    box.dataset.drawn = "done";
  };
  const seen = () => [...document.querySelectorAll("[data-chart]")].filter((box) => !box.closest("details:not([open])"));
  const all = async () => { for (const box of seen()) await draw(box); document.documentElement.dataset.ready = "true"; };
  document.addEventListener("toggle", (event) => { if (event.target.open) all(); }, true);
  all();
})();
