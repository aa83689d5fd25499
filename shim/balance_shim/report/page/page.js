"use strict";
(function () {
  // Printed pages cannot be opened up.
  addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (each) { each.open = true; });
  });
  var source = document.getElementById("what-if-data");
  if (!source) return;
  var data = JSON.parse(source.textContent);
  var form = document.getElementById("choose");
  var answer = document.getElementById("answer");
  function value(name) { return document.getElementById("choose-" + name).value; }
  function update() {
    var key = value("checkpointing") + "|" + value("length") + "|" + value("batch");
    var found = Object.prototype.hasOwnProperty.call(data.answers, key) ? data.answers[key] : null;
    answer.textContent = found ? found.text : data.missing;
    answer.className = found ? (found.fits ? "fits" : "over") : "";
    document.querySelectorAll("td[data-key]").forEach(function (cell) {
      cell.classList.toggle("chosen", cell.dataset.key === key);
    });
  }
  form.addEventListener("change", update);
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  form.hidden = false;
  update();
})();
