package gc

import (
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are what a scheduler counts.
type metrics struct {
	runs    *prometheus.CounterVec
	removed *prometheus.CounterVec
	took    prometheus.Histogram
	locked  prometheus.Histogram
	objects prometheus.Gauge
}

func newMetrics() metrics {
	buckets := prometheus.ExponentialBuckets(0.0001, 4, 9) // 0.1 ms to 6.5 s
	return metrics{
		runs:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "managerd_gc_collections_total", Help: "Collections, by how they ended."}, []string{"result"}),
		removed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "managerd_gc_removed_total", Help: "Objects that were removed, by kind."}, []string{"kind"}),
		took:    prometheus.NewHistogram(prometheus.HistogramOpts{Name: "managerd_gc_duration_seconds", Help: "How long collections took.", Buckets: buckets}),
		locked:  prometheus.NewHistogram(prometheus.HistogramOpts{Name: "managerd_gc_locked_seconds", Help: "How long collections kept others from writing.", Buckets: buckets}),
		objects: prometheus.NewGauge(prometheus.GaugeOpts{Name: "managerd_gc_objects", Help: "Objects that the last collection looked at."}),
	}
}

func (m *metrics) add(res Result, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.runs.WithLabelValues(result).Inc()
	for kind, n := range res.Removed {
		m.removed.WithLabelValues(kind).Add(float64(n))
	}
	m.took.Observe(res.Took.Seconds())
	m.locked.Observe(res.Locked.Seconds())
	m.objects.Set(float64(res.Objects))
}

// Metrics are what the scheduler counts, for a Prometheus registry.
func (s *Scheduler) Metrics() []prometheus.Collector {
	return []prometheus.Collector{s.metrics.runs, s.metrics.removed, s.metrics.took, s.metrics.locked, s.metrics.objects}
}
