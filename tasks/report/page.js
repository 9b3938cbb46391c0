"use strict";
(async () => {
  const root = document.documentElement;
  const plots = [...document.querySelectorAll(".plot")];
  const config = {
    displaylogo: false,
    responsive: true,
    showSendToCloud: false, // plotly.js offers to upload the figures unless told not to
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
  };
  try {
    const packed = Uint8Array.from(
      atob(document.getElementById("plotly").textContent),
      (letter) => letter.charCodeAt(0),
    );
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const library = document.createElement("script");
    library.textContent = await new Response(stream).text();
    document.head.append(library);
    const figures = JSON.parse(document.getElementById("figures").textContent);
    const draw = async (some) => {
      for (const plot of some) {
        plot.textContent = "";
        const { data, layout } = figures[plot.id];
        await Plotly.newPlot(plot, data, layout, config);
      }
    };
    // What is folded away has no width to be drawn in.
    const folded = document.getElementById("pairs");
    await draw(plots.filter((plot) => !folded?.contains(plot)));
    folded?.addEventListener("toggle", () => draw(folded.querySelectorAll(".plot")), { once: true });
  } catch (error) {
    for (const plot of plots) plot.textContent = `This plot could not be drawn: ${error}`;
    root.dataset.plots = "failed";
    throw error;
  }

  for (const choice of document.querySelectorAll("input[name=over]")) {
    choice.addEventListener("change", () => {
      const plot = document.getElementById("plot-loss");
      const x = plot.data.map((trace) => trace.meta[choice.value]);
      Plotly.update(plot, { x }, {
        "xaxis.title.text": choice.dataset.title,
        "xaxis.autorange": true,
        "yaxis.autorange": true,
      });
    });
  }

  for (const choice of document.querySelectorAll("input[name=scale]")) {
    choice.addEventListener("change", () => {
      Plotly.relayout("plot-loss", { "yaxis.type": choice.value, "yaxis.autorange": true });
    });
  }

  const seen = () => plots.filter((plot) => plot.clientWidth && plot.data);
  const fit = () => seen().forEach((plot) => Plotly.relayout(plot, { width: plot.clientWidth }));
  addEventListener("beforeprint", () => {
    root.classList.add("printing");
    fit();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    seen().forEach((plot) => Plotly.relayout(plot, { autosize: true, width: null }));
  });
  root.dataset.plots = String(seen().length);
})();
