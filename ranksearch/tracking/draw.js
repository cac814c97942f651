// Draws the figures of a page: unpacks plotly, then fills every place whose JSON stands behind it, in the page's own colours and in its
// scheme. A place that is folded away is filled when it is opened. The event "figure" is fired at a place when it is first filled.
{
  const unpacked = async () => {
    const bytes = Uint8Array.from(atob(document.getElementById("packed").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };
  const { light, dark, twins, shades } = JSON.parse(document.getElementById("looks").textContent);
  const page = document.documentElement, scheme = matchMedia("(prefers-color-scheme: dark)");
  const places = () => [...document.querySelectorAll(".plotly-graph-div")].filter((place) => !place.closest("details:not([open])"));

  // lines across the axes that there is room for: the numbers that matter most, and the last two, cost and metric
  const AXIS = 90;
  const across = (trace, room, colorscale) => {
    trace.line.colorscale = colorscale;
    trace.dimensions = trace.dimensions.filter((_, i, all) => i < Math.max(room - 2, 1) || i >= all.length - 2);
  };
  const fill = (place, look) => {
    const twin = (key, value) => (look === "dark" && key === "color" && twins[value]) || value;
    const { data, layout } = JSON.parse(place.nextElementSibling.textContent, twin);
    const { color, backgroundColor: ground } = getComputedStyle(document.body);
    Object.assign(layout, {
      template: look === "dark" ? dark : light, font: { color }, paper_bgcolor: ground, plot_bgcolor: ground,
      hoverlabel: { bgcolor: ground, font: { color } }, uirevision: true,  // what a reader zoomed or hid stays so
    });
    for (const trace of data) if (trace.type === "parcoords") across(trace, Math.floor(place.clientWidth / AXIS), shades[look] || shades.light);
    if (look === "paper") {
      Object.assign(layout, { width: place.parentElement.clientWidth, height: Number(place.dataset.paper) });
      layout.font.size = 10;
      if (layout.legend) layout.legend.y = -0.36;  // below the axis' title of so low a figure
    }
    Plotly.react(place, data, layout, { displayModeBar: false, responsive: true });
    const first = !place.dataset.look;
    place.dataset.look = look;
    if (first) place.dispatchEvent(new Event("figure", { bubbles: true }));
  };
  const draw = () => {
    const look = page.classList.contains("printed") ? "paper" : scheme.matches ? "dark" : "light";
    for (const place of places()) if (place.dataset.look !== look) fill(place, look);
  };
  // paper is white and shows everything
  const print = () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
    page.classList.add("printed");
    draw();
  };
  const screen = () => {
    page.classList.remove("printed");
    draw();
  };

  unpacked().then(() => {
    draw();
    for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", draw);
    scheme.addEventListener("change", draw);
    window.addEventListener("beforeprint", print);
    window.addEventListener("afterprint", screen);
    document.body.classList.add("figures-drawn");
  }).catch((error) => {
    for (const place of places()) place.textContent = `This browser cannot draw the figures (${error}); it takes Chrome 80, Firefox 113, Safari 16.4 or later.`;
  });
}
