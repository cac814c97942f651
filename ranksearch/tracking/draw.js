// Draws the figures of a page: unpacks plotly, then fills every place whose JSON stands behind it. A place that is folded away is
// filled when it is opened. The event "figure" is fired at a place when it is filled.
{
  const unpacked = async () => {
    const bytes = Uint8Array.from(atob(document.getElementById("packed").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };
  const look = JSON.parse(document.getElementById("look").textContent);
  const places = () => [...document.querySelectorAll(".plotly-graph-div")].filter((place) => !place.closest("details:not([open])"));

  const draw = () => {
    for (const place of places()) {
      if (place.classList.contains("drawn")) continue;
      const { data, layout } = JSON.parse(place.nextElementSibling.textContent);
      Plotly.newPlot(place, data, { ...layout, template: look }, { displayModeBar: false, responsive: true });
      place.classList.add("drawn");
      place.dispatchEvent(new Event("figure", { bubbles: true }));
    }
  };
  // paper shows everything, as wide as it is; `Plots.resize` would come too late
  const print = () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
    document.body.classList.add("printed");
    const drawn = places().filter((place) => place.classList.contains("drawn"));
    draw();
    for (const place of drawn) Plotly.relayout(place, { width: place.parentElement.clientWidth });
  };
  const screen = () => {
    document.body.classList.remove("printed");
    for (const place of places()) Plotly.relayout(place, { width: null, autosize: true });
  };

  unpacked().then(() => {
    draw();
    for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", draw);
    window.addEventListener("beforeprint", print);
    window.addEventListener("afterprint", screen);
    document.body.classList.add("figures-drawn");
  }).catch((error) => {
    for (const place of places()) place.textContent = `This browser cannot draw the figures (${error}); it takes Chrome 80, Firefox 113, Safari 16.4 or later.`;
  });
}
